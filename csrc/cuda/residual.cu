#include "residual.h"

#include "levels.h"
#include "search_ops.h"

namespace vqops::cuda {
namespace {

// Workspace: 8 bytes per row and level for errors, 8 per row for units.
struct LevelsWork {
    double *square = nullptr, *errors = nullptr, *partial = nullptr;

    static LevelsWork take(Memory& memory, int64_t H, int64_t N, int64_t Q, bool units) {
        LevelsWork work;
        work.square = units ? memory.take<double>(H * N) : nullptr;
        work.errors = memory.take<double>(H * Q * N);
        work.partial = memory.take<double>(H * Q * runs_of(N));
        return work;
    }
};

}  // namespace

template <bool sorted>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize(
    const Tensor& x, std::vector<Tensor> codebooks, OptionalTensor mask, OptionalTensor levels, std::string metric,
    std::string, bool, bool with_sums, double, bool normalize, bool snapshot,
    std::optional<std::vector<Tensor>> prepared) {
    const char* op = "residual_quantize";
    const bool units = is_cosine(op, metric) && normalize;
    const int64_t Q = int64_t(codebooks.size());
    STD_TORCH_CHECK(Q > 0 && (!prepared || int64_t(prepared->size()) == Q), op,
                    ": codebooks must not be empty, and prepared must have one for each");
    int64_t all = 0;
    for (const Tensor& codebook : codebooks) {
        check_search_arguments(op, x, codebook, mask);
        STD_TORCH_CHECK(codebook.scalar_type() == codebooks[0].scalar_type(), op, ": codebooks must have one dtype");
        all += codebook.size(1);
    }
    const int64_t H = x.size(0), N = x.size(1), D = x.size(2);
    const Running running = {running_levels(op, levels)};
    const Gpu gpu(x);
    const ScalarType real = real_type(x);
    Tensor quantized = torch::stable::new_empty(x, x.sizes());
    Tensor indices = torch::stable::new_empty(x, {H, N, Q}, ScalarType::Long);
    Tensor error = torch::stable::new_empty(x, {H, Q}, real);
    Tensor counts = unused(x, ScalarType::Long), sums = unused(x, ScalarType::Float);
    if (with_sums) {
        counts = torch::stable::new_empty(x, {H, all}, ScalarType::Long);
        sums = torch::stable::new_empty(x, {H, all, D}, ScalarType::Float);
    }
    const Tensor rest = Q > 1 ? torch::stable::new_empty(x, {H, N, D}, real) : unused(x, real);
    const Tensor total = x.scalar_type() == real ? quantized : torch::stable::new_empty(rest, rest.sizes(), real);
    const OptionalTensor kept =
        levels ? OptionalTensor(torch::stable::new_empty(x, {H, N}, ScalarType::Bool)) : std::nullopt;
    Memory dry;
    LevelsWork::take(dry, H, N, Q, units);
    const Tensor memory = gpu.allocate(dry.size);
    Memory pieces(memory.mutable_data_ptr());
    const LevelsWork work = LevelsWork::take(pieces, H, N, Q, units);
    const NextLevel next = {work.square, kept ? static_cast<bool*>(kept->mutable_data_ptr()) : nullptr};
    const EightPerRow by_row = {H, N};
    const Rows rows = rows_of(op, x), left = {rest.const_data_ptr(), dtype_of(op, rest), N * D, D, 1};
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        using Real = typename ErrorOf<T>::type;
        if (units || kept) gpu.launch(FirstLevel<T>{by_row, D, rows.as<T>(), mask_of(mask), running, next});
        for (int64_t l = 0, first = 0; l < Q; first += codebooks[l++].size(1)) {
            const Tensor& codebook = codebooks[l];
            const int64_t K = codebook.size(1);
            const Tensor found = nearest(l == 0 ? x : rest, codebook, kept ? kept : mask, metric,
                                         prepared ? OptionalTensor((*prepared)[l]) : std::nullopt);
            const RowsByCode by_code = rows_by_code(op, found, x, K);
            if (with_sums) {
                LevelPart of_counts(counts, first, K, ScalarType::Long), of_sums(sums, first, K, ScalarType::Float);
                const SumsWork<float> space(gpu, by_code, sorted, of_sums.tensor(), &of_counts.tensor());
                if (l == 0) sum_level(gpu, rows.as<T>(), work.square, space.out);
                else sum_level(gpu, left.as<Real>(), work.square, space.out);
                of_counts.give(), of_sums.give();
            }
            gpu.launch(TakeOff<T>{by_row, D, Q, l, rows.as<T>(), rows_of(op, codebook), by_code.indices, mask_of(mask),
                                  running, static_cast<Real*>(rest.mutable_data_ptr()),
                                  static_cast<Real*>(total.mutable_data_ptr()),
                                  static_cast<T*>(quantized.mutable_data_ptr()),
                                  static_cast<int64_t*>(indices.mutable_data_ptr()), work.errors, next});
        }
    });
    add_errors(gpu, work.errors, H * Q, N, work.partial, error.mutable_data_ptr(), dtype_of(op, error));
    Tensor old = snapshot ? joined(codebooks[0], codebooks, all) : unused(codebooks[0], codebooks[0].scalar_type());
    return {quantized, indices, error, counts, sums, old};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_SUMS(residual_quantize); }
