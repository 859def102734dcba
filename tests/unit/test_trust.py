"""Files are data: nothing that the packages load may run code, and no name in a file may lead out of its folder."""

import ast

import pytest

from data_pipeline.names import is_plain_name
from tests.training import ROOT

PACKAGES = ("train", "model", "data_pipeline", "eval")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
YAML_LOADERS = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all", "Loader", "FullLoader", "UnsafeLoader"}
RUNNERS = {"eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system", "os.popen", "subprocess.getoutput"}
REQUIRED = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}  # an argument, and the only value that will do


def forbidden(source: str) -> list[str]:
    """``line: what`` of everything in a module that may run what a file says."""
    tree = ast.parse(source)
    names = {}  # what a name of this module stands for
    for node in ast.walk(tree):
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if alias.asname or module:  # `import a.b` alone makes the name a
                names[alias.asname or alias.name] = module + alias.name

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node)
            module, _, function = name.rpartition(".")
            # A class may derive from pickle.Unpickler and refuse what is not known: see eval.bin_pack.
            unpickles = module in UNPICKLERS and function not in ("Unpickler", "UnpicklingError")
            if unpickles or (module == "yaml" and function in YAML_LOADERS):
                found.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.Call):
            name, keywords = full_name(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            argument, value = REQUIRED.get(name, (None, None))
            given = keywords.get(argument)
            if argument and not (isinstance(given, ast.Constant) and given.value is value):
                found.append(f"{node.lineno}: {name} without {argument}={value}")
            if name in RUNNERS or name in ("pickle.Unpickler", "pandas.read_pickle"):
                found.append(f"{node.lineno}: {name}()")
            for keyword in ("shell", "allow_pickle"):
                if keyword in keywords and ast.unparse(keywords[keyword]) != "False" and argument != keyword:
                    found.append(f"{node.lineno}: {name} with {keyword}")
    return found


def test_nothing_that_is_loaded_can_run_code():
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 50
    assert [f"{path.relative_to(ROOT)}:{what}" for path in files for what in forbidden(path.read_text())] == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch as t\nt.load(path, weights_only=trusted)",
        "from torch import load as read\nread(path)",
        "import pickle\npickle.load(file)",
        "import pickle\npickle.Unpickler(file).load()",
        "from pickle import loads\nloads(data)",
        "import dill\nread = dill.loads",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass Loader(yaml.Loader): pass",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy\nnumpy.lib.format.read_array(file, allow_pickle=True)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import os\nos.system(command)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_a_loader_that_can_run_code_would_be_found(code):
    assert len(forbidden(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import yaml\nclass Loader(yaml.SafeLoader): pass\nyaml.dump(data, Dumper=yaml.SafeDumper)",
        "import pickle\nclass Unpickler(pickle.Unpickler):\n    def find_class(self, *name): raise pickle.UnpicklingError(name)",
        "net.eval()\nbackbone.compile()\nre.compile(pattern)",
        "from eval.pairs import evaluate_pairs\nimport eval.pairs",
    ],
)
def test_what_is_safe_is_not_found(code):
    assert forbidden(code) == []


@pytest.mark.parametrize(("name", "plain"), [("a", True), ("a b.c", True), (".hidden", True), ("..a", True), ("", False), (".", False),
                                             ("..", False), ("/a", False), ("a/b", False), ("../a", False), ("a/", False), ("a\0", False),
                                             (None, False), (7, False), (b"a", False)])  # fmt: skip
def test_a_plain_name_lies_directly_in_its_folder(name, plain):
    assert is_plain_name(name) == plain
