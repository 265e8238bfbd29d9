import pytest
import torch
from contract import Contract, Subject
from cuda_emulator.load import backend
from triton_rows import plan_small_steps

from em_kernels.backends import cpu, reference, triton
from em_kernels.backends.triton import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

class TestReference(Contract):
    IMPLS=("reference",)
    LENGTHS=(1,2,13,100)
    LONG=1000
    PLACES=(0,500,999)
    @pytest.fixture
    def subject(self, impl):
        return Subject(reference, rowwise=False, condition={"self_certainty": 5})
    test_entropy_slope_of_the_likeliest_token = None

class TestCpu(Contract):
    IMPLS = tuple(cpu.isa_levels())
    LENGTHS = (1, 2, 15, 16, 17, 37, 63, 64, 65, 4095, 4096, 4097)
    LONG = 9001
    PLACES = (0, 17, 4095, 4096, 9000)
    @pytest.fixture
    def subject(self, impl):
        before = cpu.get_isa()
        cpu.set_isa(impl)
        yield Subject(cpu, fused=True, on_gpu=False)
        cpu.set_isa(before)

DEVICES = {
    "h200": {},
    "small": {"shared_per_block": 2704, "shared_per_multiprocessor": 100_000},
    "no_clusters": {"compute_capability": 80},
}
class TestCuda(Contract):
    IMPLS = tuple(DEVICES)
    LENGTHS = (1, 7, 8, 33, 1000, 2100, 4097, 8003)
    LONG = 3000
    PLACES = (0, 1023, 2048, 2999)
    @pytest.fixture
    def subject(self, impl):
        return Subject(backend(0, **DEVICES[impl]))

class TestTriton(Contract):
    IMPLS = ("triton",)
    LENGTHS = (1, 3, 33, 64, 169)
    DTYPES, FLOATS = (torch.float32, torch.bfloat16), (torch.float32,)
    LONG = 178
    PLACES = (0, 67, 177)
    @pytest.fixture
    def subject(self, impl, monkeypatch):
        monkeypatch.setattr(launch, "plan", plan_small_steps)
        return Subject(triton, bfloat16=2.0**-7)
