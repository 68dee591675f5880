// The CPU kernels as ops: tensors in, tensors out.

#include <limits>

#include "../bindings.h"
#include "code_sums.h"
#include "codebook.h"
#include "ema.h"
#include "gather.h"
#include "hash.h"
#include "quantize_backward.h"
#include "residual.h"
#include "residual_backward.h"
#include "sample.h"
#include "unprepared.h"

#include <algorithm>
#include <atomic>
#include <mutex>

namespace vqops {
namespace {

Parallel threads() {
    instructions();  // a wrong VQOPS_CPU is reported here, not from within a thread
    const int count = int(torch::stable::get_num_threads());
    return {count, [](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
                torch::stable::parallel_for(0, size, 1, body);
            }};
}

void check_index(const char* op, int64_t wrong, int64_t K) {
    STD_TORCH_CHECK(wrong < 0, op, ": indices must be -1 or a code in [0, ", K, "); row ", wrong, " is not");
}

Tensor prepare(const Tensor& codebook, std::string metric) {
    const bool cosine = is_cosine("prepare", metric);
    check_search_arguments("prepare", codebook, codebook, std::nullopt);
    const int64_t H = codebook.size(0), K = codebook.size(1), D = codebook.size(2);
    Tensor packed = new_tensor(codebook, {H * Packed::bytes(K, D)}, ScalarType::Byte);
    char* memory = static_cast<char*>(packed.mutable_data_ptr());
    for (int64_t h = 0; h < H; h++)
        pack_codebook(rows_of("prepare", codebook), h, K, D, cosine, memory + h * Packed::bytes(K, D), threads());
    return packed;
}

SearchShape shape_of(const Tensor& x, const Tensor& codebook, bool cosine) {
    return {x.size(0), x.size(1), codebook.size(1), x.size(2), cosine};
}

// Makes `packed` the preparation of the codebook, unless `stamp` says that it is: {1, hash of the codes it was made of}.
// A search of x that goes without a preparation leaves an old one.
void keep_prepared_(const Tensor& x, const Tensor& codebook, Tensor packed, Tensor stamp, std::string metric) {
    const char* op = "keep_prepared_";
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, x, codebook, std::nullopt);
    const int64_t H = codebook.size(0), K = codebook.size(1), D = codebook.size(2);
    const Rows codes = rows_of(op, codebook);
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                        packed.numel() == H * Packed::bytes(K, D),
                    op, ": packed must be uint8 [", H * Packed::bytes(K, D), "]");
    STD_TORCH_CHECK(stamp.scalar_type() == ScalarType::Long && stamp.is_contiguous() && stamp.numel() == 2, op,
                    ": stamp must be int64 [2]");
    uint64_t* made = static_cast<uint64_t*>(stamp.mutable_data_ptr());
    std::atomic_ref<uint64_t> there(made[0]);
    if (there == 1 && is_direct(shape_of(x, codebook, cosine), rows_of(op, x), codes)) return;
    const Tensor values = torch::stable::contiguous(codebook);
    const int64_t bytes = values.numel() * bytes_of(codes.dtype);
    const uint64_t kind = uint64_t(cosine) << 8 | uint64_t(codes.dtype);
    const uint64_t hash = hash_of(values.const_data_ptr(), bytes, kind, threads());
    // Threads that search with the same module: one prepares, the others wait.
    static std::mutex preparing;
    const std::lock_guard<std::mutex> alone(preparing);
    if (there == 1 && made[1] == hash) return;
    there = 0;
    char* memory = static_cast<char*>(packed.mutable_data_ptr());
    for (int64_t h = 0; h < H; h++)
        pack_codebook(codes, h, K, D, cosine, memory + h * Packed::bytes(K, D), threads());
    made[1] = hash;
    there = 1;
}

Tensor prepared_or_new(const char* op, const Tensor& codebook, const OptionalTensor& prepared,
                       const std::string& metric) {
    if (!prepared) return prepare(codebook, metric);
    const int64_t H = codebook.size(0), K = codebook.size(1), D = codebook.size(2);
    bool fits = prepared->scalar_type() == ScalarType::Byte && prepared->is_contiguous() &&
                prepared->numel() == H * Packed::bytes(K, D);
    if (fits) {
        const Header* header = static_cast<const Header*>(prepared->const_data_ptr());
        fits = header->layout == layout() && header->K == K && header->D == D && header->cosine == (metric == "cosine");
    }
    STD_TORCH_CHECK(fits, op, ": prepared was made by another implementation or for another codebook or metric");
    return *prepared;
}

// Negative and NaN are 0, infinity is the largest float32.
double temperature_of(const char* op, const Tensor& temperature, const Tensor& seed) {
    STD_TORCH_CHECK(temperature.numel() == 1 && temperature.scalar_type() == ScalarType::Float && seed.numel() == 2 &&
                        seed.scalar_type() == ScalarType::Long,
                    op, ": temperature must be one float32, and seed two int64");
    const float value = *static_cast<const float*>(temperature.const_data_ptr());
    return value > 0 ? std::min(value, std::numeric_limits<float>::max()) : 0;
}

void run_search(const char* op, const Tensor& x, const Tensor& codebook, const OptionalTensor& mask,
                const std::string& metric, const OptionalTensor& prepared, const SearchResult& result,
                const Gathered* gathered = nullptr) {
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, x, codebook, mask);
    const Rows rows = rows_of(op, x), codes = rows_of(op, codebook);
    const SearchShape shape = shape_of(x, codebook, cosine);
    OptionalTensor packed;
    if (prepared || !is_unprepared(shape.N, rows, codes)) packed = prepared_or_new(op, codebook, prepared, metric);
    const bool direct = !packed || (prepared && is_direct(shape, rows, codes));
    const void* memory = direct ? nullptr : packed->const_data_ptr();
    if (gathered) search_and_gather(shape, rows, codes, mask_of(mask), memory, result.indices, *gathered, threads());
    else search(shape, rows, codes, mask_of(mask), memory, result, threads());
}

Tensor nearest(const Tensor& x, const Tensor& codebook, OptionalTensor mask, std::string metric,
               OptionalTensor prepared) {
    Tensor indices = new_tensor(x, {x.size(0), x.size(1)}, ScalarType::Long);
    run_search("nearest", x, codebook, mask, metric, prepared,
               {static_cast<int64_t*>(indices.mutable_data_ptr()), 1, nullptr, nullptr});
    return indices;
}

std::tuple<Tensor, Tensor> nearest_topk(const Tensor& x, const Tensor& codebook, int64_t k, OptionalTensor mask,
                                        std::string metric, OptionalTensor prepared) {
    STD_TORCH_CHECK(k >= 1 && k <= kLargestK && k <= codebook.size(1), "nearest_topk: k must be from 1 to min(K, ",
                    kLargestK, "), got ", k);
    Tensor indices = new_tensor(x, {x.size(0), x.size(1), k}, ScalarType::Long);
    Tensor distances = new_tensor(x, {x.size(0), x.size(1), k}, real_type(x));
    run_search("nearest_topk", x, codebook, mask, metric, prepared,
               {static_cast<int64_t*>(indices.mutable_data_ptr()), k, distances.mutable_data_ptr(), nullptr});
    return {indices, distances};
}

Tensor search_statistics(const Tensor& x, const Tensor& codebook, std::string metric) {
    Tensor indices = new_tensor(x, {x.size(0), x.size(1)}, ScalarType::Long);
    Tensor tiers = torch::stable::new_zeros(x, {kTiers}, ScalarType::Long);
    run_search("search_statistics", x, codebook, std::nullopt, metric, std::nullopt,
               {static_cast<int64_t*>(indices.mutable_data_ptr()), 1, nullptr,
                static_cast<int64_t*>(tiers.mutable_data_ptr())});
    return tiers;
}

Tensor sample(const Tensor& x, const Tensor& codebook, const Tensor& temperature, const Tensor& seed,
              OptionalTensor mask, std::string metric) {
    const bool cosine = is_cosine("sample", metric);
    check_search_arguments("sample", x, codebook, mask);
    const double given = temperature_of("sample", temperature, seed);
    if (given == 0) return nearest(x, codebook, mask, metric, std::nullopt);
    Tensor indices = new_tensor(x, {x.size(0), x.size(1)}, ScalarType::Long);
    const Tensor numbers = torch::stable::contiguous(seed);
    draw_codes(shape_of(x, codebook, cosine), rows_of("sample", x), rows_of("sample", codebook), mask_of(mask), given,
               static_cast<const int64_t*>(numbers.const_data_ptr()), static_cast<int64_t*>(indices.mutable_data_ptr()),
               threads());
    return indices;
}

std::tuple<Tensor, Tensor> sums_of(const char* op, const Tensor& x, const Tensor& indices, int64_t K,
                                   const OptionalTensor& weight, bool units) {
    STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [H, N, D]");
    const int64_t H = x.size(0), D = x.size(2);
    Tensor counts = new_tensor(x, {H, K}, weight ? ScalarType::Float : ScalarType::Long);
    Tensor sums = new_tensor(x, {H, K, D}, ScalarType::Float);
    const Rows weights = weight ? rows_of(op, *weight) : Rows{};
    const int64_t wrong = sum_codes({H, x.size(1), K, D, units}, rows_of(op, x), indices_of(op, indices, x, K),
                                    weight ? &weights : nullptr,
                                    {counts.mutable_data_ptr(), static_cast<float*>(sums.mutable_data_ptr())},
                                    threads());
    check_index(op, wrong, K);
    return {counts, sums};
}

std::tuple<Tensor, Tensor> code_sums(const Tensor& x, const Tensor& indices, int64_t num_codes, OptionalTensor weight) {
    return sums_of("code_sums", x, indices, num_codes, weight, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize(
    const Tensor& x, const Tensor& codebook, OptionalTensor mask, OptionalTensor weight, std::string metric,
    std::string, bool with_sums, double, bool normalize, bool snapshot, OptionalTensor prepared) {
    const bool units = metric == "cosine" && normalize;
    Tensor indices = new_tensor(x, {x.size(0), x.size(1)}, ScalarType::Long);
    Tensor quantized = new_tensor(x, x.sizes(), x.scalar_type());
    Tensor error = new_tensor(x, {x.size(0), x.size(1)}, real_type(x));
    const Gathered gathered = {quantized.mutable_data_ptr(), error.mutable_data_ptr(), units};
    run_search("quantize", x, codebook, mask, metric, prepared,
               {static_cast<int64_t*>(indices.mutable_data_ptr()), 1, nullptr, nullptr}, &gathered);
    Tensor counts = unused(x, ScalarType::Long), sums = unused(x, ScalarType::Float);
    if (with_sums) std::tie(counts, sums) = sums_of("quantize", x, indices, codebook.size(1), weight, units);
    return {quantized, indices, error, counts, sums, snapshot_of(codebook, snapshot)};
}

std::tuple<Tensor, Tensor> quantize_backward(OptionalTensor grad_quantized, OptionalTensor grad_error, const Tensor& x,
                                             const Tensor& codebook, const Tensor& indices, OptionalTensor mask,
                                             std::string metric, std::string passing, double codebook_error_scale,
                                             bool normalize, bool x_needed, bool codebook_needed) {
    const char* op = "quantize_backward";
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, x, codebook, mask);
    const Rows quantized = grad_quantized ? rows_of(op, *grad_quantized) : Rows{};
    const Rows error = grad_error ? rows_of(op, *grad_error) : Rows{};
    Tensor grad_x = new_or_unused(x, x_needed), grad_codebook = new_or_unused(codebook, codebook_needed);
    const BackwardInputs in = {grad_quantized ? &quantized : nullptr,
                               grad_error ? &error : nullptr,
                               rows_of(op, x),
                               rows_of(op, codebook),
                               indices_of(op, indices, x, codebook.size(1)),
                               mask_of(mask),
                               passing_of(passing),
                               codebook_error_scale,
                               cosine && normalize};
    const int64_t wrong = backward(shape_of(x, codebook, cosine), in, x_needed ? grad_x.mutable_data_ptr() : nullptr,
                                   codebook_needed ? grad_codebook.mutable_data_ptr() : nullptr, threads());
    check_index(op, wrong, codebook.size(1));
    return {grad_x, grad_codebook};
}

// The first levels that run.
int64_t running_levels(const char* op, const OptionalTensor& levels, int64_t Q) {
    if (!levels) return Q;
    STD_TORCH_CHECK(levels->numel() == 1 && levels->scalar_type() == ScalarType::Long, op, ": levels must be one int64");
    return std::clamp<int64_t>(*static_cast<const int64_t*>(levels->const_data_ptr()), 0, Q);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize(
    const Tensor& x, std::vector<Tensor> codebooks, OptionalTensor mask, OptionalTensor levels, std::string metric,
    std::string, bool, bool with_sums, double, bool normalize, bool snapshot,
    std::optional<std::vector<Tensor>> prepared) {
    const char* op = "residual_quantize";
    const bool cosine = is_cosine(op, metric);
    const int64_t Q = int64_t(codebooks.size());
    STD_TORCH_CHECK(Q > 0 && (!prepared || int64_t(prepared->size()) == Q), op,
                    ": codebooks must not be empty, and prepared must have one for each");
    std::vector<Tensor> held;  // what the levels point into
    const Rows rows = rows_of(op, x);
    ResidualInputs in = {x.size(0), x.size(1), x.size(2), rows, mask_of(mask), {}, running_levels(op, levels, Q),
                         cosine, cosine && normalize};
    const Rows rest = {nullptr, in.real(), 0, in.D, 1};
    int64_t all = 0;
    for (int64_t l = 0; l < Q; l++) {
        const Tensor codebook = torch::stable::contiguous(codebooks[l]);
        check_search_arguments(op, x, codebook, mask);
        STD_TORCH_CHECK(codebook.scalar_type() == codebooks[0].scalar_type(), op, ": codebooks must have one dtype");
        const Rows codes = rows_of(op, codebook);
        const SearchShape shape = {1, in.N, codebook.size(1), in.D, cosine};
        const void* memory = nullptr;
        const bool same = l > 0 && codes.data == in.levels.back().codebook.data && shape.K == in.levels.back().K;
        if (same && !prepared) {  // a codebook that the levels share
            memory = in.levels.back().packed;
        } else if (l < in.running && (prepared ? !is_direct(shape, rest, codes) : !is_unprepared(in.N, rest, codes))) {
            const OptionalTensor given = prepared ? OptionalTensor((*prepared)[l]) : std::nullopt;
            held.push_back(prepared_or_new(op, codebook, given, metric));
            memory = held.back().const_data_ptr();
        }
        in.levels.push_back({codes, codebook.size(1), memory});
        held.push_back(codebook);
        all += codebook.size(1);
    }
    Tensor quantized = new_tensor(x, x.sizes(), x.scalar_type());
    Tensor indices = new_tensor(x, {in.H, in.N, Q}, ScalarType::Long);
    Tensor error = new_tensor(x, {in.H, Q}, real_type(x));
    int64_t* found = static_cast<int64_t*>(indices.mutable_data_ptr());
    quantize_levels(in, {quantized.mutable_data_ptr(), found, error.mutable_data_ptr()}, threads());
    Tensor counts = unused(x, ScalarType::Long), sums = unused(x, ScalarType::Float);
    if (with_sums) {
        counts = new_tensor(x, {in.H, all}, ScalarType::Long);
        sums = new_tensor(x, {in.H, all, in.D}, ScalarType::Float);
        sum_levels(in, found, static_cast<int64_t*>(counts.mutable_data_ptr()),
                   static_cast<float*>(sums.mutable_data_ptr()), threads());
    }
    Tensor old = snapshot ? joined(codebooks[0], codebooks, all) : unused(codebooks[0], codebooks[0].scalar_type());
    return {quantized, indices, error, counts, sums, old};
}

std::tuple<Tensor, Tensor> residual_quantize_backward(
    OptionalTensor grad_quantized, OptionalTensor grad_error, const Tensor& x, const Tensor& codebooks,
    std::vector<int64_t> sizes, const Tensor& given, OptionalTensor mask, OptionalTensor levels, std::string metric,
    std::string passing, bool per_level, double codebook_error_scale, bool normalize, bool x_needed,
    bool codebooks_needed) {
    const char* op = "residual_quantize_backward";
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, x, codebooks, mask);
    check_level_gradients(op, grad_quantized, grad_error, x, codebooks, sizes, given);
    const Tensor indices = torch::stable::contiguous(given);
    const int64_t H = x.size(0), N = x.size(1), Q = int64_t(sizes.size());
    const int64_t* chosen = static_cast<const int64_t*>(indices.const_data_ptr());
    for (int64_t row = 0; row < H * N; row++)
        for (int64_t l = 0; l < Q; l++) {
            const int64_t k = chosen[row * Q + l];
            if (k < -1 || k >= sizes[l]) check_index(op, row, sizes[l]);
        }
    const Rows quantized = grad_quantized ? rows_of(op, *grad_quantized) : Rows{};
    const Rows error = grad_error ? rows_of(op, *grad_error) : Rows{};
    Tensor grad_x = new_or_unused(x, x_needed), grad_codebooks = new_or_unused(codebooks, codebooks_needed);
    const LevelGradients in = {H, N, x.size(2),
                               grad_quantized ? &quantized : nullptr,
                               grad_error ? &error : nullptr,
                               rows_of(op, x),
                               rows_of(op, codebooks),
                               sizes,
                               chosen,
                               mask_of(mask),
                               running_levels(op, levels, Q),
                               passing_of(passing),
                               per_level,
                               codebook_error_scale,
                               cosine && normalize};
    levels_backward(in, x_needed ? grad_x.mutable_data_ptr() : nullptr,
                    codebooks_needed ? grad_codebooks.mutable_data_ptr() : nullptr, threads());
    return {grad_x, grad_codebooks};
}

void ema_update_(Tensor cluster_size, Tensor embed_avg, OptionalTensor embed, const Tensor& counts, const Tensor& sums,
                 const Tensor& decay, double eps, OptionalTensor weight, std::string metric) {
    const char* op = "ema_update_";
    const bool cosine = is_cosine(op, metric), counted = counts.scalar_type() == ScalarType::Long;
    check_ema_arguments(op, cluster_size, embed_avg, embed, counts, sums, decay, weight);
    const int64_t H = embed_avg.size(0), K = embed_avg.size(1), D = embed_avg.size(2);
    const Tensor summed = as_float(sums), number = counted ? as_contiguous(counts) : as_float(counts);
    const OptionalTensor weights = weight ? OptionalTensor(as_float(*weight)) : std::nullopt;
    const float kept = *static_cast<const float*>(decay.const_data_ptr());
    for (int64_t h = 0; h < H; h++) {
        const EmaHead head = {
            K,
            D,
            kept,
            float(eps),
            cosine,
            float_data(op, cluster_size, "cluster_size") + h * K,
            float_data(op, embed_avg, "embed_avg") + h * K * D,
            embed ? float_data(op, *embed, "embed") + h * K * D : nullptr,
            counted ? static_cast<const int64_t*>(number.const_data_ptr()) + h * K : nullptr,
            counted ? nullptr : static_cast<const float*>(number.const_data_ptr()) + h * K,
            static_cast<const float*>(summed.const_data_ptr()) + h * K * D,
            weights ? static_cast<const float*>(weights->const_data_ptr()) + h * K : nullptr,
        };
        ema_update(head, threads());
    }
}

}  // namespace
}  // namespace vqops

// Each kernel stands for its device in the op that selects, and is an op of its own.
#define VQOPS_KERNEL(name)                         \
    m.impl(#name, TORCH_BOX(&vqops::name));        \
    m.impl(#name "_compiled", TORCH_BOX(&vqops::name))

STABLE_TORCH_LIBRARY_IMPL(vqops, CPU, m) {
    VQOPS_KERNEL(nearest);
    VQOPS_KERNEL(nearest_topk);
    VQOPS_KERNEL(prepare);
    VQOPS_KERNEL(keep_prepared_);
    VQOPS_KERNEL(search_statistics);
    VQOPS_KERNEL(code_sums);
    VQOPS_KERNEL(quantize);
    VQOPS_KERNEL(quantize_backward);
    VQOPS_KERNEL(residual_quantize);
    VQOPS_KERNEL(residual_quantize_backward);
    VQOPS_KERNEL(sample);
    VQOPS_KERNEL(ema_update_);
}
