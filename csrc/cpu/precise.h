// The codes packed once more, as float, for rows that bfloat16 leaves more candidates than their lists hold. Codebooks of
// heavy-tailed data, as image patches are, leave half of the rows so, and to compare these with all codes in turn
// (unprepared.h) takes several times as long as to screen them again.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "codebook.h"
#include "row_buffer.h"

namespace vqops {

// Of all heads of a search, for its threads; `set` is Instructions.precise of the set in use.
class PreciseCodebook {
public:
    PreciseCodebook(const Instructions& set, const SearchShape& shape, const Rows& codebook)
        : set(set), shape_(shape), codebook_(codebook), heads_(new Head[shape.H]) {}

    // Takes note of rows that were screened, and of those among them that go on. False: they are too few for packing.
    bool takes(int64_t screened, int64_t queued) {
        screened_ += screened;
        return (queued_ += queued) > kFewRows;
    }

    // So many rows would end here that all may as well begin here.
    bool takes_all() const {
        return queued_ > kFewRows && double(queued_) > instructions().too_often * double(screened_);
    }

    // Packed by the thread that asks first; the others wait.
    Packed head(int64_t h) {
        Head& head = heads_[h];
        std::call_once(head.once, [&] {
            head.held = std::make_unique<CacheLines>(Packed::bytes(shape_.K, shape_.D, set));
            const Parallel alone = {1, [](int64_t count, const auto& body) { body(0, count); }};
            pack_codebook(codebook_, h, shape_.K, shape_.D, shape_.cosine, head.held->data, alone, set);
        });
        return Packed(head.held->data, shape_.K, shape_.D);
    }

    const Instructions& set;

private:
    static constexpr int64_t kFewRows = 96;  // packing costs as much as comparing so many (unprepared.h)

    struct Head {
        std::once_flag once;
        std::unique_ptr<CacheLines> held;
    };

    const SearchShape shape_;
    const Rows codebook_;
    std::unique_ptr<Head[]> heads_;
    std::atomic<int64_t> screened_{0}, queued_{0};
};

// Null where the set in use takes float.
inline std::unique_ptr<PreciseCodebook> precise_codebook(const SearchShape& shape, const Rows& codebook) {
    const Instructions* set = instructions().precise;
    return set ? std::make_unique<PreciseCodebook>(*set, shape, codebook) : nullptr;
}

}  // namespace vqops
