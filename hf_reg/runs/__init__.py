"""Runs that a recipe describes: `hf-reg train RECIPE.yaml`. Nothing here imports torch before a recipe is read."""

from .errors import RecipeError, RunError, user_errors
from .recipe import Recipe, load_recipe
from .run import train_from


__all__ = ["Recipe", "RecipeError", "RunError", "load_recipe", "train_from", "user_errors"]
