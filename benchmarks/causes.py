"""Why a peer is faster than vqops, by case as `python -m benchmarks.report` names it. A loss that is not here fails a
test: find its cause first, by a profile, by `vqops.search_statistics` or by the rows of a neighbouring case."""

CAUSES: dict[str, tuple[str, ...]] = {
    "The codebook is packed inside the time, for few vectors; prepared, vqops is the faster. The peer has its index "
    "for nothing.": (
        "nearest, VQGAN f16 16384",
        "nearest, MAGVIT-2 size",
        "nearest, growth over N, N = 256",
    ),
    "Few codes: centring and packing a row, and deciding in float64 what the bound leaves open, take as long as the "
    "products.": ("nearest, growth over K, K = 64",),
    "Values far apart in scale: the error bound of a fast pass grows with the length of a vector and of the codes, and "
    "nearly flat patches lie among codes that it can't tell apart. Many of the rows are compared with every code once "
    "more (`vqops.search_statistics`). The peer does not look, and takes a wrong code for some.": (
        "nearest, 32768 x 64 x 512, patches",
        "nearest, 65536 x 64 x 1024, patches",
        "nearest, 32768 x 128 x 1024, patches",
        "nearest, 4096 x 256 x 8192, patches",
        "nearest, 8192 x 8 x 16384, patches",
    ),
    "The order of addition is fixed: rows are sorted by code, and those of a code gathered and added in runs. That, a "
    "pass over the indices that looks for one out of range, and arrays of K counts outweigh the additions where a code "
    "has few rows. `index_add_` adds in the order of the rows.": (
        "code_sums, VQGAN f16",
        "code_sums, VQGAN f16 16384",
        "code_sums, LlamaGen",
    ),
    "Averages and codes are passed over twice, by code without the vector instructions of the processor, since a code "
    "whose averages are not finite must keep them; PyTorch does not look.": (
        "ema_update_, VQ-VAE-2 bottom",
        "ema_update_, VQGAN f16",
        "ema_update_, VQGAN f16 16384",
        "ema_update_, LlamaGen",
    ),
    "A backward in Python around the op, and K counts that only a gradient of the codes needs, for few rows; that of "
    "PyTorch is in C++.": (
        "quantize_backward, straight-through, VQGAN f16 16384",
        "quantize_backward, rotation, VQGAN f16 16384",
        "quantize_backward, straight-through, LlamaGen",
        "quantize_backward, rotation, LlamaGen",
    ),
    "The fixed cost of a call: checks of arguments, of the state of a module and dispatch, in Python, which few lines "
    "by hand do without.": (
        "nearest, 1 x 128 x 1024",
        "training step, RQ-VAE",
        "evaluation, 1 x 256 x 2048",
    ),
    "No kernel yet: distances come from products in float64.": (
        *("code_cross_entropy, VQGAN f16", "code_cross_entropy, VQGAN f16 16384"),
        *("assignment_entropy, VQGAN f16", "assignment_entropy, VQGAN f16 16384"),
        *("soft_codes, VQGAN f16", "soft_codes, VQGAN f16 16384"),
    ),
    "The packed codebook; `vqops.prepare` keeps it, but it is memory all the same. scikit-learn goes through the codes "
    "a part at a time.": ("memory of nearest, 12 288, 64, 8 192",),
}


def cause_of(case: str) -> str | None:
    return next((cause for cause, cases in CAUSES.items() if case in cases), None)
