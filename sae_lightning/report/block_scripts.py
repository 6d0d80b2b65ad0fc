"""Data blocks of a page that is too large for one file, as scripts in a folder beside it.

The browser loads them on demand. They are scripts because a page that is opened from disk may not
fetch data files.

    index.html        names the folder
    index-3f2a.../    named by a hash of its content, so that an old page never loads new blocks
        feature.js    blocks.add("feature", "...base64...")
        feature-0.js
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sae_lightning.files import convert_write_errors, make_private_folder

HASH_DIGITS = 12  # hex digits of the hash in a folder's name


def write_blocks(page: Path, blocks: Mapping[str, str]) -> str:
    """Write the blocks of `page` into a folder beside it; return the folder's name."""
    with convert_write_errors(page), make_private_folder(page) as temporary:
        folder = temporary / "blocks"
        folder.mkdir()

        def write(name: str) -> bytes:
            content = f'blocks.add("{name}", "{blocks[name]}");\n'.encode()
            (folder / f"{name}.js").write_bytes(content)
            return hashlib.sha256(content).digest()

        # blocks are compressed when they are read, by zlib, which releases the GIL
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digest = hashlib.sha256(b"".join(pool.map(write, blocks)))
        destination = page.with_name(f"{page.stem}-{digest.hexdigest()[:HASH_DIGITS]}")
        if not destination.exists():
            os.replace(folder, destination)
    return destination.name


def remove_old_blocks(page: Path, kept: str | None) -> None:
    """Remove all block folders of `page` except the one named `kept`."""
    pattern = rf"{re.escape(page.stem)}-[0-9a-f]{{{HASH_DIGITS}}}"
    for folder in page.parent.iterdir():
        if re.fullmatch(pattern, folder.name) and folder.name != kept and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
