"""The README keeps its promises: its recipe runs as printed, the files it names exist, nothing is left to fill in."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from reflective_masking import MaskDiffusionTransformer, TransformerConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


class HuggingFaceStyle(torch.nn.Module):
    """Takes inputs_embeds and returns an object with .logits, as such models do."""

    def __init__(self):
        super().__init__()
        self.network = MaskDiffusionTransformer(
            TransformerConfig(vocabulary=12, length=6, width=16, feed_forward=16, layers=1, positions="rotary")
        )

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.network.embedding)

    def forward(self, input_ids=None, inputs_embeds=None):
        inputs = self.network.embedding[input_ids] if inputs_embeds is None else inputs_embeds
        return SimpleNamespace(logits=self.network(inputs))


def test_the_recipe_trains_and_answers_with_a_foreign_model():
    code = re.search(r"<!-- recipe -->\n```python\n(.*?)```", README, re.S).group(1)
    torch.manual_seed(0)
    names = {"model": HuggingFaceStyle(), "base_model": HuggingFaceStyle(), "mask_id": 11}
    exec(code, names)
    clean = torch.randint(11, (4, 6))
    editable = torch.arange(6).expand(4, 6) >= 2
    optimizer = torch.optim.AdamW(names["model"].parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = names["training_loss"](clean, editable)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    tokens = names["answer"](torch.where(editable, 11, clean), editable)
    assert torch.equal(tokens[:, :2], clean[:, :2]) and (tokens != 11).all()


def test_every_file_that_the_readme_names_exists():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    named = set(re.findall(r"\]\(([\w/.]+)\)", prose)) | set(re.findall(r"`((?:results|checkpoints)/[\w.]+)`", prose))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing and "@@" not in README
