"""The pages keep their promises: the recipe runs as printed; files and numbers are there."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "results/README.md")}
README = PAGES["README.md"]


class Foreign(nn.Module):
    """A stranger's bidirectional network, called as Hugging Face models are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(8, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 12)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        padding = None if attention_mask is None else attention_mask == 0
        x = self.layers(x + self.positions[: x.shape[1]], src_key_padding_mask=padding)
        return SimpleNamespace(logits=self.head(x))


@pytest.fixture
def recipe():
    code = re.search(r"<!-- recipe -->\n```python\n(.*?)```", README, re.S).group(1)
    torch.manual_seed(0)
    x = torch.randint(11, (4, 8))
    names = {"model": Foreign().eval(), "base_model": Foreign().eval(), "mask_id": 11, "x": x}
    exec(code, names)
    return SimpleNamespace(**names)


def test_the_recipe_trains_and_answers_padded_prompts_as_one_by_one(recipe):
    length = torch.tensor([8, 7, 6, 5])
    mask = (torch.arange(8) < length.unsqueeze(1)).long()
    editable = (torch.arange(8) >= 2) & mask.bool()
    optimizer = torch.optim.AdamW(recipe.model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = recipe.training_loss(recipe.x, editable, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])

    tokens = recipe.x.masked_fill(editable, 11)
    answers = recipe.answer(tokens, editable, mask)
    assert (answers != 11).all() and torch.equal(answers[~editable], tokens[~editable])
    for i, n in enumerate(length):
        alone = recipe.answer(tokens[i : i + 1, :n], editable[i : i + 1, :n], mask[i : i + 1, :n])
        assert torch.equal(alone[0], answers[i, :n])


def test_the_recipe_refuses_a_network_that_scales_its_embeddings():
    class Scales(Foreign):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
            if inputs_embeds is None:
                inputs_embeds = 4 * self.embedding(input_ids)
            return super().forward(None, inputs_embeds, attention_mask)

    code = re.search(r"<!-- recipe -->\n```python\n(.*?)```", README, re.S).group(1)
    with pytest.raises(AssertionError):
        exec(code, {"model": Scales().eval(), "mask_id": 11, "x": torch.randint(11, (4, 8))})


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    here = (ROOT / page).parent
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    links = re.findall(r"\]\(([\w./]+)\)", prose)
    path = r"\b(?:checkpoints|results|tests)/\w+\.\w+|(?<!/)\b\w+\.py\b"
    named = re.findall(path, PAGES[page])
    missing = [name for name in links if not (here / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing and "PENDING" not in PAGES[page]


def test_records_are_few_and_named_in_the_pages():
    records = {path.name for path in (ROOT / "results").glob("*.json")}
    named = {name for page in PAGES.values() for name in re.findall(r"\b\w+\.json\b", page)}
    assert len(records) <= 30
    assert not records - named, "records that no page names"
    figures = {
        path.name for path in (ROOT / "results").iterdir() if path.suffix in (".png", ".gif")
    }
    assert not [name for name in figures if not any(name in page for page in PAGES.values())]


def leaves(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    elif isinstance(value, int | float):
        yield value


def rows_with_keys():
    """(file, key, {heading: cell}) of every table row whose last column names a record."""
    page = PAGES["results/README.md"]
    for table in re.finditer(r"(?:^\|.*\n)+", page, re.M):
        lines = table.group().splitlines()
        if not lines[0].endswith("| key |"):
            continue
        before = re.sub(r"^\|.*\n", "", page[: table.start()], flags=re.M)
        file = re.findall(r"`(\w+\.json)`", before)[-1]
        for line in lines[2:]:
            *cells, key = line.strip("|").split("|")
            if "`" in key and "json" not in key:
                heads = lines[0].strip("|").split("|")
                yield file, key.strip(" `"), dict(zip(heads[1:], cells[1:]))


def test_every_number_of_a_table_is_in_the_record_that_its_row_names():
    checked = 0
    for file, key, cells in rows_with_keys():
        record = json.loads((ROOT / "results" / file).read_text())
        for part in key.split("/"):
            record = record[part]
        for head, cell in cells.items():
            part = record
            if isinstance(record, list) and isinstance(record[0], dict):  # by passes
                part = next(row for row in record if row["passes"] == int(head.split()[0]))
            known = {scale * value for value in leaves(part) for scale in (1, 100)}
            for text in re.findall(r"[+−]?\d+(?:\.\d+)?", cell.replace(",", "")):
                number = float(text.replace("−", "-"))
                near = 0.5 * 10 ** -len(text.partition(".")[2]) + 1e-6
                assert any(abs(value - number) <= near for value in known), f"{file} {key}: {text}"
                checked += 1
    assert checked > 500


def test_the_readme_keeps_its_order():
    heads = re.findall(r"^## (.*)", README, re.M)
    assert heads == [
        "Two commands",
        "The method in one screen",
        "Where it stands",
        "Files, in reading order",
        "Your own model",
        "Kernels",
        "Differences",
        "What did not work",
    ]
