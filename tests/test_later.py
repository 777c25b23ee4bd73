"""What is imported of torch when somebody asks for it: nothing is lost. In processes of their own: torch is imported
once in each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engine.later import NAMES
from engine.models.registry import CLASSES
from tests.models.table import SIZES
from tests.test_process import IS_MAPPED

ROOT = Path(__file__).parent.parent
BEGIN = "import sys\nfrom engine import later\nlater.begin()\nimport torch\n"


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_computes_without_them() -> None:
    assert run(BEGIN + "print(torch.ones(3).sum().item(), 'torch._decomp' in sys.modules)") == "3.0 False\n"


def test_whoever_asks_has_the_module() -> None:
    code = BEGIN + (
        "held = torch._meta_registrations\nassert 'register_meta' not in vars(held), 'it was imported at once'\n"
        "theirs = held.register_meta\n"
        "real = torch._meta_registrations\n"
        "assert real is not held and vars(real)['register_meta'] is theirs is held.register_meta\n"
        "assert sys.modules['torch._meta_registrations'] is real\n"
        "try:\n    held.nothing_of_it\nexcept AttributeError as error:\n    print(error)"
    )
    assert run(code) == "module 'torch._meta_registrations' has no attribute 'nothing_of_it'\n"


def test_meta_tensors_have_their_operators_behind_it() -> None:
    code = (
        "x = torch.empty(2, 3, dtype=torch.int32, device='meta')\n"
        "try:\n    x >> 1\nexcept NotImplementedError:\n    print('none')\n"
        "torch._meta_registrations.aten\nprint((x >> 1).shape)"
    )
    assert run(BEGIN + code) == "none\ntorch.Size([2, 3])\n"


def test_many_threads_ask_at_once() -> None:
    code = BEGIN + (
        "import threading\nsys.setswitchinterval(1e-5)\nbarrier, found = threading.Barrier(8), []\n"
        "def ask():\n    barrier.wait()\n    found.append(torch._meta_registrations.register_meta)\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(len(found), len(set(found)))"
    )
    assert run(code) == "8 1\n"


def test_shapes_of_every_class_are_found_without_them() -> None:
    code = BEGIN + (
        "import json, pathlib, tempfile\n"
        "from engine.models.loading.weights import ShapeRecorder\n"
        "from engine.models.parts.streams import make_decoder\n"
        "from engine.models.registry import read_spec\n"
        "classes = json.loads(sys.argv[1])\n"
        "for name, sizes in classes.items():\n"
        "    with tempfile.TemporaryDirectory() as directory:\n"
        "        path = pathlib.Path(directory)\n"
        "        (path / 'config.json').write_text(json.dumps({'architectures': [name], **sizes}))\n"
        "        recorder = ShapeRecorder(torch.float32)\n"
        "        make_decoder(read_spec(path), recorder, 256)\n"
        "        assert recorder.shapes, name\n"
        "print(len(classes), 'torch._decomp' in sys.modules)"
    )
    classes = {name: SIZES.get(name, {}) for name in CLASSES}
    assert run(code, json.dumps(classes)) == f"{len(classes)} False\n"


def test_a_model_that_needs_them_has_them() -> None:
    code = BEGIN + (
        "from engine.models.loading.weights import recorded\n"
        "def make(source):\n    return (source.raw('x', (4, 2)) >> 1).shape\n"
        "print(recorded(make, torch.float32), 'torch._decomp' in sys.modules, later.everything())\n"
        "def fails(source):\n    raise NotImplementedError('whatever else')\n"
        "try:\n    recorded(fails, torch.float32)\nexcept NotImplementedError as error:\n    print(error)"
    )
    assert run(code) == "({'x': (4, 2)}, torch.Size([4, 2])) True False\nwhatever else\n"


def test_models_of_random_weights_and_torchs_own_products() -> None:
    # torch.Generator cannot be called without what is put off.
    code = BEGIN + (
        "from engine.ops.invariance import find_row_tile, seeded\n"
        "import torch.nn.functional as F\n"
        "weight = torch.ones(8, 16)\n"
        "assert find_row_tile(lambda x: F.linear(x, weight), 16, 8, torch.float32) is not None\n"
        "same = torch.randn(5, generator=seeded(7)), torch.randn(5, generator=seeded(7))\n"
        "from engine.llm import LLM, SamplingParams\n"
        "with LLM(load_format='dummy', max_model_len=64) as llm:\n"
        "    [output] = llm.generate(['a'], SamplingParams(max_tokens=4, ignore_eos=True))\n"
        "print(torch.equal(*same), len(output.outputs[0].token_ids), 'torch._decomp' in sys.modules)\n"
        "torch._meta_registrations.aten\n"
        "assert torch.equal(same[0], torch.randn(5, generator=torch.Generator().manual_seed(7)))\n"
    )
    assert run(code).splitlines()[-1] == "True 4 False"


def test_a_server_begins_so() -> None:
    code = (
        "import sys\nfrom engine.process import begin\nthread = begin()\n"
        "import torch\nassert thread is None or thread.join() is None\n"
        "print(thread is None, 'torch._decomp' in sys.modules)"
    )
    assert run(code) == ("False False\n" if IS_MAPPED else "True True\n")


def test_nothing_happens_once_torch_is_there() -> None:
    code = "import sys, torch\nfrom engine import later\nbefore = list(sys.meta_path)\nlater.begin()\n"
    assert run(code + "print(sys.meta_path == before, 'torch._decomp' in sys.modules)") == "True True\n"


def test_the_names_exist() -> None:
    # A module that torch does not have any more is never asked for; one that it has under another name would be missed.
    code = f"import importlib.util\nprint([name for name in {NAMES!r} if importlib.util.find_spec(name) is None])"
    assert run(code) == "[]\n"
