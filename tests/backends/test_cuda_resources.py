"""What the compiled CUDA kernels use: registers, spills, wide loads, barriers."""

import importlib
import json
import os

import cuda_offline
import pytest


@pytest.fixture(scope="module")
def module():
    found = cuda_offline.module_file()
    if found is None:
        pytest.skip("em_kernels._cuda is not built")
    if cuda_offline.cuobjdump() is None and os.environ.get("CI") != "true":
        pytest.skip("there is no cuobjdump: it comes with nvcc and with triton")
    return found


@pytest.fixture(scope="module")
def kernels(module):
    return cuda_offline.report(module)


@pytest.fixture(scope="module")
def table():
    return json.loads(cuda_offline.TABLE.read_text())


def is_plain(name):
    return name.startswith("resident_loss") or name.endswith("true>")


def test_every_kernel_is_in_the_table_and_in_the_build(kernels, table):
    recorded = table["registers, stack, local, shared"]
    compared = recorded.keys() & kernels.keys()
    built = importlib.import_module("em_kernels._cuda").architectures
    assert compared or not {"sm_80", "sm_90", "sm_100"} & set(built.split())
    for arch in compared:
        assert kernels[arch].keys() == recorded[arch].keys(), arch


def test_kernels_use_no_more_than_is_recorded(kernels, table):
    """Another nvcc may take other registers; the launch bounds keep those in check."""
    if importlib.import_module("em_kernels._cuda").nvcc != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    for title, columns in cuda_offline.TABLES.items():
        for arch, recorded in table[title].items():
            for name, most in recorded.items() if arch in kernels else ():
                used = [kernels[arch][name][column] for column in columns]
                message = f"{arch} {name} uses {used}: if meant, run tests/cuda_offline.py --write"
                assert all(a <= b for a, b in zip(used, most, strict=True)), message


def test_a_row_that_is_not_aligned_costs_few_instructions_more(kernels):
    """And no load or store of single numbers: two wide loads a vector, of which a chunk has four.

    The eight numbers that the first vector of a row of 16 bits is made of are loaded one by one,
    in the same loop and by one thread.
    """
    for arch, each in kernels.items():
        for name, aligned in each.items():
            if "Aligned" not in name:
                continue
            unaligned = each[name.replace("Aligned", "Unaligned")]
            assert unaligned["loop_instructions"] <= 1.26 * aligned["loop_instructions"], name
            assert unaligned["loop_stores"] == aligned["loop_stores"], (arch, name)
            assert unaligned["loop_loads"] <= 2 * aligned["loop_loads"] + 8, (arch, name)


def test_no_plain_kernel_spills(kernels):
    plain = [
        (arch, name, k) for arch in kernels for name, k in kernels[arch].items() if is_plain(name)
    ]
    assert plain
    for arch, name, kernel in plain:
        assert kernel["stack"] == kernel["local"] == 0, (arch, name)


def test_kernels_read_and_write_16_bytes_at_a_time(kernels):
    for arch, each in kernels.items():
        for name, kernel in each.items():
            if name.startswith("stream_"):
                assert kernel["wide_loads"] >= 4, (arch, name)
            if name.startswith("stream_gradient"):
                assert kernel["wide_stores"] >= 4, (arch, name)


def test_what_no_other_thread_reads_takes_no_place_in_l1(kernels):
    """The logits of whole chunks of aligned rows; of others, neighbours share 16 bytes."""
    for arch, each in kernels.items():
        for name, kernel in each.items():
            passes = name.startswith("stream_") and "Unaligned" not in name
            assert kernel["passing_loads"] >= 4 * passes, (arch, name)
            assert passes or kernel["passing_loads"] == 0, (arch, name)


def test_the_gradient_reads_the_logits_last(module):
    """L2 gives them up first; those of statistics it may keep until the gradient reads them."""
    loads = cuda_offline.last_loads(module)
    if not loads:
        pytest.skip("this build holds no PTX")
    for name, count in loads.items():
        last = name.startswith("stream_gradient") and "Unaligned" not in name
        assert count >= 4 * last and (last or count == 0), name


def test_the_loss_brings_a_row_into_shared_memory_by_bulk_copies(kernels):
    for arch, each in kernels.items():
        resident = [kernel for name, kernel in each.items() if name.startswith("resident_loss")]
        assert len(resident) == 3
        for kernel in resident if int(arch[3:].rstrip("af")) >= 90 else ():
            assert kernel["bulk_copies"] and kernel["cluster_barriers"]
            assert kernel["copies_with_a_policy"] == kernel["bulk_copies"]  # read once
            assert kernel["wide_shared_loads"] >= 4 and kernel["wide_stores"] >= 4


def test_one_thread_of_a_block_waits_for_memory_before_the_blocks_meet(kernels):
    """One fence of the device, and no kernel of one that does not meet has one."""
    for arch, each in kernels.items():
        for name, kernel in each.items():
            of_blocks = name.startswith(("resident_loss", "stream_statistics"))
            meets = of_blocks and int(arch[3:].rstrip("af")) >= 90
            assert kernel["fences"] == meets, (arch, name)


def test_where_a_row_begins_is_computed_in_64_bits(module):
    products = cuda_offline.wide_products(module)
    if not products:
        pytest.skip("this build holds no PTX")
    for name, count in products.items():
        views = 1 if name.startswith("stream_statistics") else 2
        assert count >= 3 * views, f"{name}: {count} products of 64 bits"
