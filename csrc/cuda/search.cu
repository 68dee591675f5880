#include "search_ops.h"

#include <cstdlib>

#include "search.h"

namespace vqops::cuda {
namespace {

// Workspace of a search, beside the packed codebook: 4 bytes per row and 16 to 32 per code; 130 KB per head or less for
// parts and counters; where a GPU has few rows 140 bytes per row and share, some megabytes.
struct SearchWork {
    int32_t *marks = nullptr, *counters = nullptr;
    uint32_t* queue = nullptr;
    Best* parts = nullptr;
    Candidates* lists = nullptr;

    static SearchWork take(Memory& memory, int64_t H, int64_t N, int64_t K, int64_t shares) {
        SearchWork work;
        work.marks = memory.take<int32_t>(H * 2 * slots_of(K));
        work.counters = memory.take<int32_t>(counters_of(H, N));
        work.queue = memory.take<uint32_t>(H * N);
        work.parts = memory.take<Best>(H * parts_of(N, K));
        work.lists = memory.take<Candidates>(shares > 1 ? H * shares * N : 0);
        return work;
    }

    static int64_t bytes(int64_t H, int64_t N, int64_t K, int64_t shares) {
        Memory dry;
        take(dry, H, N, K, shares);
        return dry.size;
    }
};

Preparation preparation(const char* op, const Tensor& codebook, bool cosine, const Tensor& packed, int32_t* marks) {
    const int64_t H = codebook.size(0), K = codebook.size(1), D = codebook.size(2);
    return {H, K, D, rows_of(op, codebook), cosine, static_cast<char*>(packed.mutable_data_ptr()), Packed::bytes(K, D),
            marks, slots_of(K)};
}

int64_t packed_bytes(const Tensor& codebook) {
    return codebook.size(0) * Packed::bytes(codebook.size(1), codebook.size(2));
}

void run_search(const char* op, const Tensor& x, const Tensor& codebook, const OptionalTensor& mask,
                const std::string& metric, const OptionalTensor& prepared, int64_t* indices, int64_t k,
                const Tensor* distances, int64_t* tiers) {
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, x, codebook, mask);
    const int64_t H = x.size(0), N = x.size(1), K = codebook.size(1), D = x.size(2);
    STD_TORCH_CHECK(H * N < INT32_MAX && K <= kMostCodes, op, ": x may have up to 2^31 rows, and codebook 2^30 codes");
    STD_TORCH_CHECK(!prepared || (prepared->is_cuda() && prepared->get_device_index() == x.get_device_index() &&
                                  prepared->scalar_type() == ScalarType::Byte && prepared->is_contiguous() &&
                                  prepared->numel() == packed_bytes(codebook) &&
                                  reinterpret_cast<uintptr_t>(prepared->const_data_ptr()) % kAlignment == 0),
                    op, ": prepared was made by another implementation, on another device or for another codebook");
    if (H * N == 0) return;
    const Gpu gpu(x);
    SearchOutputs out = {indices, k, distances ? distances->mutable_data_ptr() : nullptr,
                         distances ? dtype_of(op, *distances) : DType::float32, reinterpret_cast<Count*>(tiers)};
    const Rows rows = rows_of(op, x);
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        const SearchInputs<T> in = {{H, N, K, D, cosine}, rows.as<T>(), rows_of(op, codebook), mask_of(mask)};
        const Abilities able = abilities_of(x.get_device_index());
        const int64_t shares = search_shares(in, out, able);
        const Tensor memory = gpu.allocate(SearchWork::bytes(H, N, K, shares));
        const Tensor packed = prepared ? *prepared : gpu.allocate(shares ? packed_bytes(codebook) : 0);
        Memory pieces(memory.mutable_data_ptr());
        const SearchWork work = SearchWork::take(pieces, H, N, K, shares);
        out.queue = work.queue, out.queued = work.counters, out.arrived = work.counters + H;
        out.parts = work.parts, out.lists = work.lists;
        Preparation codes = preparation(op, codebook, cosine, packed, work.marks);
        if (!shares) codes.memory = nullptr;
        search<Stream>(gpu, in, out, codes, prepared.has_value(), able);
    });
}

}  // namespace

Abilities abilities_of(int device) {
    // So that a GPU can tell which of them is wrong, and which is fast.
    static const char* const asked = std::getenv("VQOPS_WGMMA");
    static const std::string name = asked ? asked : "";
    static const Wgmma wanted = name == "0" ? Wgmma::none : name == "loader" ? Wgmma::loaded : Wgmma::alone;
    const Limits& gpu = limits_of(device);
    const bool able = VQOPS_WGMMA && gpu.major == 9 && gpu.minor == 0;
    return {size_t(gpu.shared_bytes), able ? wanted : Wgmma::none, gpu.multiprocessors};
}

Tensor nearest(const Tensor& x, const Tensor& codebook, OptionalTensor mask, std::string metric,
               OptionalTensor prepared) {
    Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
    run_search("nearest", x, codebook, mask, metric, prepared, static_cast<int64_t*>(indices.mutable_data_ptr()), 1,
               nullptr, nullptr);
    return indices;
}

std::tuple<Tensor, Tensor> nearest_topk(const Tensor& x, const Tensor& codebook, int64_t k, OptionalTensor mask,
                                        std::string metric, OptionalTensor prepared) {
    STD_TORCH_CHECK(k >= 1 && k <= codebook.size(1), "nearest_topk: k must be from 1 to K, got ", k);
    Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(1), k}, ScalarType::Long);
    Tensor distances = torch::stable::new_empty(x, {x.size(0), x.size(1), k}, real_type(x));
    run_search("nearest_topk", x, codebook, mask, metric, prepared,
               static_cast<int64_t*>(indices.mutable_data_ptr()), k, &distances, nullptr);
    return {indices, distances};
}

Tensor prepare(const Tensor& codebook, std::string metric) {
    const char* op = "prepare";
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, codebook, codebook, std::nullopt);
    STD_TORCH_CHECK(codebook.size(1) <= kMostCodes, op, ": codebook may have up to 2^30 codes");
    const Gpu gpu(codebook);
    Tensor packed = gpu.allocate(packed_bytes(codebook));
    const Tensor memory = gpu.allocate(SearchWork::bytes(codebook.size(0), 0, codebook.size(1), 1));
    Memory pieces(memory.mutable_data_ptr());
    const SearchWork work = SearchWork::take(pieces, codebook.size(0), 0, codebook.size(1), 1);
    pack_codebook(gpu, preparation(op, codebook, cosine, packed, work.marks));
    return packed;
}

Tensor search_statistics(const Tensor& x, const Tensor& codebook, std::string metric) {
    Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
    Tensor tiers = torch::stable::new_zeros(x, {kTiers}, ScalarType::Long);
    run_search("search_statistics", x, codebook, std::nullopt, metric, std::nullopt,
               static_cast<int64_t*>(indices.mutable_data_ptr()), 1, nullptr,
               static_cast<int64_t*>(tiers.mutable_data_ptr()));
    return tiers;
}

}  // namespace vqops::cuda

extern "C" int64_t vqops_cuda_packed_bytes(int64_t K, int64_t D) { return vqops::cuda::Packed::bytes(K, D); }

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) {
    VQOPS_CUDA_KERNEL(nearest);
    VQOPS_CUDA_KERNEL(nearest_topk);
    VQOPS_CUDA_KERNEL(prepare);
    VQOPS_CUDA_KERNEL(search_statistics);
}
