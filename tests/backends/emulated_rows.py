"""What the tests of the emulated CUDA kernels share: devices, inputs and checks."""

import torch
from contract.closeness import check_gradient as check_close
from contract.closeness import check_rows, true_gradient, true_rows
from contract.subject import NAN, Subject
from cuda_emulator.load import backend

from em_kernels.backends.interface import Saved

DEVICES = {
    "h200": {},
    "small": {"shared_per_block": 2704, "shared_per_multiprocessor": 100_000},
    "no_clusters": {"compute_capability": 80},
}


def emulated(device="h200", seed=0):
    return backend(seed, **DEVICES[device])


make = Subject(None).make


def check_stats(got, x, spec, outputs):
    names = (*Saved._fields, *outputs)
    check_rows(dict(zip(names, got, strict=True)), true_rows(x, spec, outputs), x.dtype)


def check_gradient(out, x, spec, upstream):
    check_close(out, true_gradient(x, spec, upstream))


def gradient(cuda, x, spec, upstream, out=None):
    return Subject(cuda).grad(x, spec, upstream, out)


def loss(cuda, x, spec, upstream, out=None, outputs=("logprob", "entropy")):
    out = torch.full_like(x, NAN) if out is None else out
    return cuda.loss(x, spec, upstream, outputs, out), out
