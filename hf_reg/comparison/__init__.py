"""Several ways to fine-tune on the same data, budget and seeds: `hf-reg compare RECIPE.yaml`, [`hf_reg.compare`].

From the recipe (`plan`) come methods (`methods`), and with sizes and seeds cells (`cells`). Processes of their own
(`worker`, `grid`) train them (`running`, on what `samples` draws, with what `measures` measures) and search
hyperparameters before (`tuning`), step costs after (`step_costs`). What is finished is on disk; `summary`
says what it shows, by `statistics`.
"""

from .comparing import compare
from .result import Comparison


__all__ = ["Comparison", "compare"]
