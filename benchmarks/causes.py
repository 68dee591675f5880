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
    "Measured before sums by code and EMA updates were written anew: lists of rows by code where none has many, and "
    "averages and codes moved without the vector instructions of the processor.": (
        "code_sums, VQGAN f16",
        *("ema_update_, VQ-VAE-2 bottom", "ema_update_, VQGAN f16", "ema_update_, VQGAN f16 16384"),
        "ema_update_, LlamaGen",
    ),
    "On the AMD processors measured before sums by code were written anew. On the Xeon most of the time of both goes "
    "into reading rows and writing sums, which are new memory, and which is ahead changes from run to run.": (
        *("code_sums, VQGAN f16 16384", "code_sums, LlamaGen", "code_sums, 32768 x 128 x 1024"),
    ),
    "The codes come from memory, once, and that is the time of both.": ("nearest, 32 x 256 x 65536",),
    "A module reads its codes to know whether what it has packed is still theirs, and then what is packed: twice as "
    "much memory for few vectors, and the fixed cost of its call in Python.": (
        *("evaluation, 13 x 256 x 2048", "evaluation, 1 x 256 x 2048", "residual evaluation, 1 x 256 x 2048"),
    ),
    "A backward in Python around the op, which takes longer than the op where rows are few and short; that of PyTorch "
    "is in C++.": (
        "quantize_backward, straight-through, VQGAN f16 16384",
        "quantize_backward, rotation, VQGAN f16 16384",
        "quantize_backward, straight-through, LlamaGen",
        "quantize_backward, rotation, LlamaGen",
        "quantize_backward, straight-through, 1 x 1 x 1",
    ),
    "The fixed cost of a call: checks of arguments, of the state of a module and dispatch, in Python, which few lines "
    "by hand do without.": (
        "nearest, 1 x 128 x 1024",
        *("nearest, 1 x 1 x 1", "quantize, 1 x 1 x 1", "code_sums, 1 x 1 x 1"),
        *("training step, RQ-VAE", "training step, 1 x 1 x 1"),
        "evaluation, 1 x 1 x 1",
    ),
    "No kernel yet: distances come from products in float64.": (
        *(
            f"{op}, {shape}"
            for op in ("code_cross_entropy", "assignment_entropy", "soft_codes")
            for shape in ("VQ-VAE-2 bottom", "VQGAN f16", "VQGAN f16 16384", "LlamaGen")
        ),
    ),
    "The packed codebook; `vqops.prepare` keeps it, but it is memory all the same. scikit-learn goes through the codes "
    "a part at a time.": ("memory of nearest, 12 288, 64, 8 192",),
}


def cause_of(case: str) -> str | None:
    return next((cause for cause, cases in CAUSES.items() if case in cases), None)
