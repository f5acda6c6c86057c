"""`longscan prepare`: text to shards of tokens, once, for any number of runs and machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from longscan.tasks.text import TextConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenize text once, with all cores, to files that training maps into memory: longscan prepare --data FOLDER --out
    FOLDER, then longscan train text --data FOLDER.

    The text is streamed: it may be larger than memory. If it was prepared before, its shards are compared with their
    checksums.
    """

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    out: Path | None = None
    """Folder to write; none: the cache, where `longscan train` with the same options finds it."""


def parse(arguments: list[str], prog: str) -> Options:
    import tyro

    return tyro.cli(tyro.conf.OmitArgPrefixes[Options], args=arguments, prog=prog)


def run(options: Options) -> int:
    """Build or check, and say what there is."""
    from longscan.cli.progress import Display
    from longscan.tasks.text import prepare

    with Display() as display:
        with display.amounts() as progress:
            corpus, _ = prepare(options.text, out=options.out, progress=progress)
        for name, tokens in (("train", corpus.train), ("held_out", corpus.held_out)):
            size, documents = getattr(corpus, f"{name}_bytes"), getattr(corpus, f"{name}_documents")
            display.line(
                f"{name.replace('_', ' ')}: {len(tokens):,} tokens ({tokens.dtype}) of {size:,} bytes in {documents:,} "
                "documents"
            )
        display.line(f"shards: [bold]{corpus.folder}[/]")
    return 0
