// The kernels that exist once for each instruction set, and the choice between them at run time.
#pragma once

#include <cstdint>

namespace vqops {

constexpr int kPanel = 16;  // codes that a register tile covers; the packed codebook is laid out in panels
constexpr int kMostTile = 6;

// Where the screening pass puts a code that the bound of a row does not exclude.
struct Offer {
    void* lists;
    void (*candidate)(void* lists, int64_t row, int64_t code, float lower);
};

struct CodeFacts {
    double key;     // weighted sum: equal for equal codes, finite where the code is
    double square;  // |scale (code - centre)|^2
};

struct Instructions {
    const char* name;
    int tile;   // rows a register tile of the screening pass
    int group;  // rows that the direct search takes together, and the multiple that it reads vectors in
    void (*screen)(const float* x, int64_t rows, int64_t stride, const float* panels, int64_t panel_count, int64_t depth,
                   const float* start, const float* threshold, const Offer& offer);
    void (*direct)(const float* x, int64_t rows, int64_t stride, const float* code, bool cosine, float factor,
                   const float* threshold, int64_t number, const Offer& offer);
    float (*centre_row)(const float* x, const float* centre, float scale, int64_t D, float* out);
    double (*exact_cost)(const double* x, const double* c, int64_t padded, bool cosine);  // exact.h
    double (*dot)(const double* x, const double* c, int64_t padded);
    CodeFacts (*measure)(const double* code, const double* weights, const double* centre, double scale, int64_t padded);
};

// The widest set that this processor has; VQOPS_CPU names another one that was compiled and that it has, for tests.
const Instructions& instructions();

// Names of what was compiled, separated by blanks, widest first.
const char* compiled_instructions();

// The exact arithmetic needs gradual underflow and rounding to nearest, whatever the thread was set to.
class DefaultFloatMode {
public:
    DefaultFloatMode();
    ~DefaultFloatMode();

private:
    unsigned saved_;
};

}  // namespace vqops
