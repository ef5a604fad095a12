"""Every method of the library as a reader meets it: its definition, source, an example in one line, measured costs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..costs import costs


__all__ = ["CATALOGUE", "Entry", "entry_of"]

SOURCE = re.compile(r"(?:From|of) \*(.+?)\*\s+\((.+?)\)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """What the docstring of a method does not say by itself.

    Args:
        definition (`str`): a formula, or what is drawn and done.
        paper (`str`): title and number.
        example (`str`): one line of Python or of a recipe.
        measured (`tuple` of `tuple`, *optional*): first and third column of its lines in costs.md.
    """

    definition: str
    paper: str
    example: str
    measured: tuple[tuple[str, str], ...] = ()


BA_LORA = "BA-LoRA, arXiv 2408.04556 (version 6)"
RPO = "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer, "
RPO += "arXiv 2405.16436"
H = "h = log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l)"
NUMERICS = "Grokking at the Edge of Numerical Stability, arXiv 2501.04697"
MULTIPLY, SKIP = ("DropHead", "multiply"), ("DropHead", "skip, p = 0.2")

RUN = (("RPO", "RPOTrainer"), ("RPO", "RPOTrainer, precomputed"))
CATALOGUE: dict[str, Entry] = {
    "tlm": Entry(
        "each layer selects token j with probability `rate`; by a fair coin it then attends to itself only "
        "(siblings-masked) or to all but itself (self-masked); no other token attends to a selected one",
        "Token-Level Masking for Transformers, EMNLP 2023, arXiv 2310.18738",
        'patch_model(model, "tlm", rate=0.1)',
        (("TLM", "TLM"),),
    ),
    "drophead": Entry(
        "o_h <- o_h * m_h * H / sum(m), m_h ~ Bernoulli(1 - p) for each of the H heads, at least one m_h = 1",
        "Scheduled DropHead: A Regularization Method for Transformer Models, Findings of EMNLP 2020, arXiv 2004.13342",
        'patch_model(model, "drophead", p=0.2, schedule="v_shape")',
        (MULTIPLY, SKIP),
    ),
    "head_mask": Entry(
        "o_h <- 0 for the heads named, in training and in evaluation",
        "Are Sixteen Heads Really Better than One?, arXiv 1905.10650",
        'patch_model(model, "head_mask", heads={0: [1, 3]})',
    ),
    "tensor_dropout": Entry(
        "U V^T <- U diag(lambda / (1 - p)) V^T, lambda_k ~ Bernoulli(1 - p); of LoRA, B A for U V^T",
        "Tensor Dropout for Robust Learning, IEEE JSTSP 2021, arXiv 1902.10758",
        'patch_model(get_peft_model(model, LoraConfig(target_modules="all-linear")), "tensor_dropout")',
    ),
    "dynamic_dropout": Entry(
        "p_t = p f(t), f the schedule: 1 - t / T, exp(-k t / T), 1 - exp(-10 t / T), by the validation losses, ...",
        "Enhancing Transformer Training Efficiency with Dynamic Dropout, arXiv 2411.03236; Curriculum Dropout, ICCV "
        "2017, arXiv 1703.06229",
        'patch_model(model, "dynamic_dropout", p=0.1, schedule="curriculum")',
    ),
    "orthonormality": Entry(
        "sum over matrices of ||M M^T - I||_F, over the short side of M",
        "SORSA, arXiv 2409.00055",
        'penalties: {orthonormality: {weight: 0.01, scope: "*lora_*"}}',
    ),
    "consistency": Entry(
        "T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T))",
        BA_LORA,
        "penalties: {consistency: {weight: 0.025, temperature: 2.0}}",
    ),
    "diversity": Entry(
        "tokens: minus the mean entropy of the softmax over each row's top_k logits; examples: `covariance`",
        BA_LORA,
        "penalties: {diversity: {weight: 0.005, schedule: two_phase}}",
    ),
    "covariance": Entry(
        "(1 / D) * sum over i != j of C_ij^2, C the covariance of the D columns of the logits",
        BA_LORA,
        "penalties: {covariance: 0.03}",
    ),
    "svd_concentration": Entry(
        "- (sum of the k largest singular values of the logits) / (their nuclear or Frobenius norm)",
        BA_LORA,
        "penalties: {svd_concentration: {weight: 0.005, schedule: two_phase}}",
    ),
    "frobenius_decay": Entry(
        "1/2 ||A B||_F^2 of factor pairs",
        "Initialization and Regularization of Factorized Neural Layers, arXiv 2105.01029",
        "penalties: {frobenius_decay: {weight: 1e-4, kind: lora}}",
    ),
    "l2_sp": Entry(
        "alpha / 2 * ||w - w0||^2 over pretrained parameters + beta / 2 * ||w||^2 over new ones",
        "Explicit Inductive Bias for Transfer Learning with Convolutional Networks, arXiv 1802.01483",
        "penalties: {l2_sp: 0.01}",
        (("trainer", "l2_sp"),),
    ),
    "ewc": Entry(
        "sum_j F_j (w_j - w0_j)^2 / 2",
        "Overcoming Catastrophic Forgetting in Neural Networks, arXiv 1612.00796",
        "penalties = [EWC(fisher=fisher_information(model, loader), weight=100.0)]",
    ),
    "r_drop": Entry(
        "mean over rows of (KL(p_a || p_b) + KL(p_b || p_a)) / 2, a and b two passes with different dropout",
        "R-Drop: Regularized Dropout for Neural Networks, arXiv 2106.14448",
        "penalties: {r_drop: 1.0}",
        (("trainer", "r_drop"),),
    ),
    "confidence": Entry(
        "minus the mean entropy of softmax(logits), in nats",
        "Regularizing Neural Networks by Penalizing Confident Output Distributions, arXiv 1701.06548",
        "penalties: {confidence: 0.1}",
        (("trainer", "confidence"),),
    ),
    "l1": Entry(
        "sum |w| over the parameters in scope", "textbook", "penalties: {l1: {weight: 1e-5, scope: adapters}}"
    ),
    "l2": Entry("1/2 sum w^2 over the parameters in scope", "textbook", "penalties: {l2: {weight: 1e-4}}"),
    "stablemax": Entry(
        "-log(s(z_y) / sum_j s(z_j)), s(z) = z + 1 for z >= 0, 1 / (1 - z) for z < 0",
        NUMERICS,
        "RegularizedTrainer(model, args, compute_loss_func=StableMaxLoss(model), train_dataset=rows)",
        (("companions", "stablemax"),),
    ),
    "strong_weight_decay": Entry(
        "w <- w - lr weight_decay w, weight_decay = 0.1 times",
        "Pre-training under Infinite Compute, ICLR 2026",
        "strong_weight_decay(args, times=30)",
    ),
    "sorsa": Entry(
        "W x = W_0 x + s (U_p diag(S_p) V_p^T - U_0 diag(S_0) V_0^T) x; a step of its own keeps U_p, V_p orthonormal",
        "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of LLMs, arXiv 2409.00055",
        "adapter: {type: sorsa, r: 16, gamma: 4e-4}",
        (("SORSA", "SORSA"), ("SORSA", "SORSA and its decoupled step"), ("SORSA", "SORSA, folded")),
    ),
    "balora": Entry(
        "L = L_task + lambda1 consistency + lambda2 diversity + lambda3 svd_concentration, A B from the r principal "
        "singular triplets",
        BA_LORA,
        "adapter: {type: balora, r: 16}",
        (("BA-LoRA", "BA-LoRA"), ("BA-LoRA", "BA-LoRA, cached teacher")),
    ),
    "rpo-cumulative": Entry(f"{H}", RPO, "train: {variant: cumulative, beta: 0.01, eta: 0.005}", RUN),
    "rpo-average": Entry(f"{H}", f"{RPO}, appendix F", "train: {variant: average, beta: 0.5, eta: 0.2}", RUN),
    "rpo-trl": Entry(f"{H}", f"{RPO}, as in TRL", "train: {variant: trl, beta: 0.01, eta: 0.005}", RUN),
}


def _paper(method: Any) -> str:
    """The paper that a docstring begins with."""
    found = SOURCE.search(method.__doc__ or "")
    return " ".join(f"{found[1]}, {found[2]}".split()) if found else ""


def entry_of(name: str, method: Any) -> Entry:
    """What there is to say of a patch or a companion: the entry of the catalogue, or else its formula, the paper of
    its docstring, and the costs under its name."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    measured = tuple({(one.section, one.ours): None for one in costs()[1] if one.ours == name})
    if hasattr(method, "FORMULA"):
        return Entry(method.FORMULA, _paper(method), f"train: {{companions: {name}}}", measured)
    return Entry(method.formula, _paper(method), f'patch_model(model, "{name}")', measured)
