"""`trtx families`: the table of what can be converted."""

import json
import re

from typer.testing import CliRunner

from tests.converters.tiny import VARIANTS
from trtx.cli.app import app
from trtx.converters.families import FAMILIES

runner = CliRunner(env={"COLUMNS": "200"})


def test_table_names_every_family():
    output = runner.invoke(app, ["families"]).output
    for family in FAMILIES:
        assert re.search(rf"^{family.name}\s", output, flags=re.MULTILINE)


def test_json_says_what_is_proven():
    rows = json.loads(runner.invoke(app, ["families", "--json"]).output)
    assert {row["family"] for row in rows} == {variant.family for variant in VARIANTS.values()}
    llama = rows[0]
    assert llama["architectures"] == ["LlamaForCausalLM"]
    assert llama["proven on"] == ["tiny", "SmolLM2-135M"]
    (latent,) = [row for row in rows if row["family"] == "deepseek_v3"]
    assert "fp8 KV cache" not in latent["quantization"]
