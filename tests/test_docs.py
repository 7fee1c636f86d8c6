"""What the documents name is there: links, modules, and fields of the configuration."""

import pathlib
import re

import pytest
from flax.traverse_util import flatten_dict

from configs import collection, common, nnunet

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = (".", "docs", "launch", "results", "tests/oracle")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_documents_name_exists(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, section = link.partition("#")
        target = (path.parent / name) if name else path
        assert link.startswith("http") or target.exists(), link
        if section and not link.startswith("http"):
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
            assert section in [heading.replace(" ", "-") for heading in plain]
    for module in re.findall(r"-m (cgs_jax[\w.]*\w)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for script in re.findall(r"(?:bash |python |`)((?:launch|benchmarks)/\w+\.\w+)", text):
        assert (ROOT / script).exists(), script
    members = collection.get_config("members=acdc+brain@nnunet+heart@acdc+neck@nnunet").to_dict()
    fields = {"data.members", *flatten_dict(members, sep=".")}
    fields |= {*flatten_dict(nnunet.get_config().to_dict(), sep=".")}
    for method in (ROOT / "configs/methods").glob("*.py"):
        fields |= {*flatten_dict(common.get_config(method.stem).to_dict(), sep=".")}
    for model in (ROOT / "configs/models").glob("*.py"):
        fields |= {*flatten_dict(common.get_config("cgs", model=model.stem).to_dict(), sep=".")}
    unknown = set(re.findall(r"--config\.([a-z_.]*[a-z_])", text)) - fields
    assert not unknown
