// For tests on any processor: the tiles of amx_bf16 with a scalar model of its instructions.

#if defined(VQOPS_BF16_MODEL)
#include "bf16_model.h"

#include "target.h"

namespace vqops {
namespace {

#include "floats4.inl"
#include "kernels.inl"
#include "tiles.inl"

struct AmxModel {
    static constexpr const char* kName = "amx_model";
    static constexpr int kLayout = 49;
    static constexpr double kWorth = 4;

    typedef float Vector __attribute__((vector_size(64)));
    typedef float UnalignedVector __attribute__((vector_size(64), aligned(4), may_alias));

    VQOPS_INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
    VQOPS_INLINE void store(float* to, Vector v) { *reinterpret_cast<UnalignedVector*>(to) = v; }
    VQOPS_INLINE Vector broadcast(float value) { return Vector{} + value; }
    VQOPS_INLINE unsigned not_above(Vector a, Vector b) {
        unsigned lanes = 0;
        for (int i = 0; i < 16; i++) lanes |= unsigned(a[i] <= b[i]) << i;
        return lanes;
    }
    VQOPS_INLINE Vector square_root(Vector v) {
        for (int i = 0; i < 16; i++) v[i] = __builtin_sqrtf(v[i]);
        return v;
    }
    VQOPS_INLINE Vector halves(Vector value, uint16_t* to) {
        for (int i = 0; i < 16; i++) {
            to[i] = to_pair(value[i]);
            value[i] = from_pair(to[i]);
        }
        return value;
    }
    VQOPS_INLINE Vector widened(const uint16_t* halves) {
        Vector value = {};
        for (int i = 0; i < 16; i++) value[i] = from_pair(halves[i]);
        return value;
    }
    VQOPS_INLINE void transpose(const void* from, void* to) {
        uint32_t lines[256], turned[256];
        __builtin_memcpy(lines, from, sizeof(lines));
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) turned[j * 16 + i] = lines[i * 16 + j];
        __builtin_memcpy(to, turned, sizeof(turned));
    }

    static thread_local ModelTile tile[8];
    static void configure() { __builtin_memset(tile, 0, sizeof(tile)); }
    static void release() { __builtin_memset(tile, 0xff, sizeof(tile)); }  // NaN
    template <int i>
    static void zero() {
        __builtin_memset(&tile[i], 0, sizeof(ModelTile));
    }
    template <int i>
    static void load(const void* from) {
        __builtin_memcpy(&tile[i], from, sizeof(ModelTile));
    }
    template <int i>
    static void store(void* to) {
        __builtin_memcpy(to, &tile[i], sizeof(ModelTile));
    }
    template <int i, int a, int b>
    static void multiply() {
        multiply_tiles(tile[i], tile[a], tile[b]);
    }
};

thread_local ModelTile AmxModel::tile[8];

struct Others : FloatWords<Floats4> {
    static constexpr const char* kName = "";
    static constexpr int kTile = 3, kCodes = 16, kLayout = 0, kDirect = 0;
};

}  // namespace

constexpr Instructions amx_model = TileKernels<AmxModel>::table(
    Kernels<Others>::table(unprepared_portable, kGroupOfPortable, turn_back_portable), &portable);

}  // namespace vqops
#endif
