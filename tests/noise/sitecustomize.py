"""Noise on every matrix product: the last bits of another CPU, another number of threads, another library.

A matrix library sums in an order that depends on the shapes, so a token's result depends on the batch that it is
computed in, by about one rounding error. How much of it is seen differs from machine to machine. This file shows it on
every machine: each product is multiplied by 1 + 2e-7 u, where u in [-1, 1] depends on the shapes of the operands and on
the place in the result, never on the contents. The same call with the same shapes still repeats bit for bit.
`pytest --shape-noise` installs it; a process that finds this folder on PYTHONPATH installs it by itself.
"""

import importlib.abc
import importlib.util
import sys
import warnings
import zlib

SIZE = 2e-7  # relative, of a float32 product: 1.7 units in the last place
PRODUCTS = "mm bmm addmm baddbmm addbmm addmv dot vdot _grouped_mm _addmm_activation".split()
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def install():
    "Put our kernels in front of torch's own for the CPU."
    import torch

    library = torch.library.Library("aten", "IMPL")
    install.kept = library  # its kernels live as long as it does
    u = torch.rand(65_521, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    tables = {}  # factors by precision, repeated as often as the largest result so far needs

    @torch.inference_mode(False)
    def factors(dtype, count):
        if len(tables.get(dtype, ())) < count:
            step = SIZE * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            tables[dtype] = (1 + step * u).to(dtype).repeat(1 + 2 * count // len(u))
        return tables[dtype]

    def noisy(out, shapes):
        if not (out.is_floating_point() or out.is_complex()):
            return out
        start, n = zlib.crc32(repr(shapes).encode()) % len(u), out.numel()
        return out * factors(out.real.dtype, start + n)[start : start + n].view(out.shape)

    def product(kernel, keys, args, options):
        "bfloat16 and float16 get their noise before they are rounded."
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        dtype, low = tensors[0].dtype, (torch.bfloat16, torch.float16)
        wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype in low else x for x in args]
        out = noisy(kernel.call_boxed(keys, *wide, **options), [tuple(x.shape) for x in tensors])
        return out.to(dtype) if dtype in low else out

    def override(name, kernel):
        with warnings.catch_warnings(action="ignore"):  # torch says once that a kernel was replaced
            library.impl(name, kernel, "CPU", with_keyset=True)

    def put(name, variant):
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

        def functional(keys, *args, **options):
            return product(kernel, keys, args, options)

        def into(keys, *args, out, **options):
            result = product(kernel, keys, args, options)
            return out.resize_(result.shape).copy_(result)

        def in_place(keys, *args, **options):
            return args[0].copy_(product(kernel, keys, args, options))

        override(name + variant, {"": functional, ".out": into, "_": in_place}[variant])

    for name in PRODUCTS:
        for variant in ("", ".out", "_"):
            if torch._C._dispatch_has_kernel(f"aten::{name}{variant}"):
                put(name, variant)
    kernel = torch.library.get_kernel(f"aten::{ATTENTION}", "CPU")

    def attention(keys, *args, **options):
        out, rest = kernel.call_boxed(keys, *args, **options)
        return noisy(out, [tuple(x.shape) for x in args[:3]]), rest

    override(ATTENTION, attention)


class _AfterTorch(importlib.abc.MetaPathFinder):
    "Installs the noise when torch has been imported, so that what needs no torch imports none."

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        run = spec.loader.exec_module

        def and_install(module):
            run(module)
            install()

        spec.loader.exec_module = and_install
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _AfterTorch())
