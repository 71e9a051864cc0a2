// The kernel of attention: one task on one thread, in the instruction set of the including file.
//
// Keys go by blocks of at most kKeyBlock. Of each, keys and values are first copied into the
// workspace, in the order in which they are read: keys in panels of kPanelVecs vectors, dimension
// by dimension, so that a vector holds one dimension of many keys; values row by row. Then kRows
// queries at a time meet the block: their scores stay in the first cache, become probabilities
// there, and weigh the values. Between blocks a softmax goes on as in FlashAttention
// (arXiv:2205.14135), with float32 sums.
//
// Products take words of 32 bits: a float, or a pair of bfloat16 that one instruction multiplies
// (AVX512_BF16). Pairs are of neighbouring dimensions in q kᵀ, of neighbouring keys in p v.

#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/element.h"

namespace encoder_fast::cpu {
namespace {

// kRows times as many vectors of sums, 24 or 12, fit the registers beside the vectors of a panel.
constexpr int kPanelVecs = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kPanelVecs * kLanes;
static_assert(kKeyBlock % kPanel == 0 && kPanel <= kBiasBeyond);

// 32 bits of an operand, wherever they lie.
typedef float Word __attribute__((aligned(1), may_alias));

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }

// How products are computed: in float32, of whatever type the operands are.
template <class Element>
struct ByFloats {
    using Storage = typename Element::Storage;
    using Io = Element;
    static constexpr int kPerWord = 1;
    static constexpr bool kExact = true;
    static constexpr bool kConverts = sizeof(Storage) != sizeof(float);

    static Vec load_words(const Storage* row, int word, int) { return Element::load(row + word); }

    static Vec multiply_add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

    static void pack_values(const Storage* row, const Storage*, int head_size, float* out) {
        for (int d = 0; d < head_size; d += kLanes) store(out + d, Element::load(row + d));
    }

    static void round_probabilities(float*, int) {}
};

#if defined(__AVX512BF16__)
struct ByPairs {
    using Storage = uint16_t;
    using Io = BFloat16;
    static constexpr int kPerWord = 2;
    static constexpr bool kExact = false;
    static constexpr bool kConverts = false;

    static Vec load_words(const Storage* row, int word, int words) {
        return load_some(row + 2 * word, smaller(words - word, kLanes));
    }

    static Vec multiply_add(Vec sum, Vec a, Vec b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(a),
                                reinterpret_cast<const __m512bh&>(b));
    }

    // Two rows, or one and nothing, as words of (even key, odd key).
    static void pack_values(const Storage* even, const Storage* odd, int head_size, float* out) {
        for (int d = 0; d < head_size; d += kLanes) {
            __m512i words = _mm512_cvtepu16_epi32(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
            if (odd != nullptr) {
                const __m512i high = _mm512_cvtepu16_epi32(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
                words = _mm512_or_si512(words, _mm512_slli_epi32(high, 16));
            }
            _mm512_storeu_si512(out + d, words);
        }
    }

    // In place: a word is written where both of its floats have been read.
    static void round_probabilities(float* row, int count) {
        for (int i = 0; i < count; i += 2 * kLanes) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(load(row + i + kLanes), load(row + i));
            _mm512_storeu_si512(row + i / 2, reinterpret_cast<const __m512i&>(pair));
        }
    }
};
#endif

// acc[r][v] += a[r][i] * b[i][v] over words i; b's rows are `stride` words apart.
template <class Product, int kRowCount, int kVecCount>
inline void multiply(const Word* const (&a)[kRows], const float* b, int stride, int words,
                     Vec (&acc)[kRowCount][kVecCount]) {
    for (int i = 0; i < words; ++i) {
        Vec right[kVecCount];
#pragma GCC unroll 4
        for (int v = 0; v < kVecCount; ++v) right[v] = load(b + i * stride + v * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kRowCount; ++r) {
            const Vec left = fill(a[r][i]);
#pragma GCC unroll 4
            for (int v = 0; v < kVecCount; ++v)
                acc[r][v] = Product::multiply_add(acc[r][v], left, right[v]);
        }
    }
}

template <class Product>
class Task {
    using Storage = typename Product::Storage;
    using Io = typename Product::Io;

  public:
    Task(const AttentionArguments& arguments, const AttentionTask& task, float* workspace)
        : args_(arguments), task_(task), words_(arguments.head_size / Product::kPerWord) {
        keys_ = workspace;
        values_ = keys_ + int64_t{kKeyBlock} * args_.head_size;
        scores_ = values_ + int64_t{kKeyBlock} * args_.head_size;
        queries_ = scores_ + kRows * kKeyBlock;
        maxima_ = queries_ + kRows * args_.head_size;
        sums_ = maxima_ + kQueryChunk;
        context_ = sums_ + kQueryChunk;
        q_ = rows(args_.q);
        k_ = rows(args_.k);
        v_ = rows(args_.v);
        bias_ = args_.bias == nullptr
                    ? nullptr
                    : args_.bias + task.head * args_.bias_stride + args_.max_seqlen - 1;
    }

    void run() {
        // Blocks begin at the same keys for all tasks of a sequence.
        const int first = seen_from(task_.first_query) / kKeyBlock * kKeyBlock;
        const int last = seen_to(task_.last_query - 1);
        for (block_ = first; block_ < last; block_ += kKeyBlock) {
            block_end_ = smaller(block_ + kKeyBlock, last);
            pack();
            int query = task_.first_query;
            for (; query + kRows <= task_.last_query; query += kRows) meet<kRows>(query);
            switch (task_.last_query - query) {
                case 5: meet<5>(query); break;
                case 4: meet<4>(query); break;
                case 3: meet<3>(query); break;
                case 2: meet<2>(query); break;
                case 1: meet<1>(query); break;
            }
        }
    }

  private:
    const Storage* rows(const Heads& x) const {
        return static_cast<const Storage*>(x.data) + task_.start * x.row_stride +
               task_.head * x.head_stride;
    }

    // The keys that a query sees.
    int seen_from(int query) const {
        return args_.window < 0 ? 0 : larger(query - args_.window, 0);
    }
    int seen_to(int query) const {
        return args_.window < 0 || query >= task_.length - 1 - args_.window
                   ? task_.length
                   : query + args_.window + 1;
    }

    void pack() {
        for (int key = block_; key < block_end_; key += kLanes) {
            const int panel = (key - block_) / kPanel, vec = (key - block_) % kPanel;
            float* out = keys_ + int64_t{panel} * kPanel * words_ + vec;
            const int count = smaller(block_end_ - key, kLanes);
            for (int word = 0; word < words_; word += kLanes)
                if (count == kLanes)
                    pack_keys<true>(key, count, word, out + int64_t{word} * kPanel);
                else
                    pack_keys<false>(key, count, word, out + int64_t{word} * kPanel);
        }
        const Storage* row = v_ + block_ * args_.v.row_stride;
        float* out = values_;
        for (int key = block_; key < block_end_; key += Product::kPerWord) {
            const Storage* next = key + 1 < block_end_ ? row + args_.v.row_stride : nullptr;
            Product::pack_values(row, next, args_.head_size, out);
            row += Product::kPerWord * args_.v.row_stride;
            out += args_.head_size;
        }
    }

    // As many words of `count` keys, turned round; behind them zeros.
    template <bool kFull>
    void pack_keys(int key, int count, int word, float* out) {
        const int64_t stride = args_.k.row_stride;
        const Storage* row = k_ + key * stride;
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            tile[i] = kFull || i < count ? Product::load_words(row, word, words_) : zeros();
            row += stride;
        }
        transpose(tile);
        const int words = smaller(words_ - word, kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            if (i < words) store(out + i * kPanel, tile[i]);
    }

    // kRowCount queries from `query` on, and the block of keys.
    template <int kRowCount>
    void meet(int query) {
        const int all_from = seen_from(query), all_to = seen_to(query + kRowCount - 1);
        const int from = larger(all_from, block_), to = smaller(all_to, block_end_);
        if (from >= to) return;
        const bool is_first = all_from >= block_, is_last = all_to <= block_end_;

        const Word* q[kRows];
        point_to_queries<kRowCount>(query, q);
        // whole panels: what lies in them and is not seen becomes 0
        const int begin = block_ + (from - block_) / kPanel * kPanel;
        Vec maxima[kRowCount];
        for (int r = 0; r < kRowCount; ++r) maxima[r] = fill(-__builtin_inff());
        for (int panel = begin; panel < to; panel += kPanel) {
            const int vecs = smaller((to - panel + kLanes - 1) / kLanes, kPanelVecs);
            switch (vecs) {
                case 4: score<kRowCount, 4>(q, query, panel, begin, maxima); break;
                case 3: score<kRowCount, 3>(q, query, panel, begin, maxima); break;
                case 2: score<kRowCount, 2>(q, query, panel, begin, maxima); break;
                default: score<kRowCount, 1>(q, query, panel, begin, maxima);
            }
        }

        const int count = to - begin;
        float decay[kRowCount];
        for (int r = 0; r < kRowCount; ++r)
            decay[r] = softmax(r, query, count, is_first, max_of_lanes(maxima[r]));

        const Word* p[kRows];
        for (int r = 0; r < kRows; ++r) p[r] = scores_ + smaller(r, kRowCount - 1) * kKeyBlock;
        const int steps = (count + Product::kPerWord - 1) / Product::kPerWord;
        const int64_t offset = (begin - block_) / Product::kPerWord;
        for (int d = 0; d < args_.head_size; d += kPanel) {
            const Sums sums{query, d, is_first, is_last, decay};
            const float* values = values_ + offset * args_.head_size + d;
            switch (smaller((args_.head_size - d) / kLanes, kPanelVecs)) {
                case 4: weigh<kRowCount, 4>(p, values, steps, sums); break;
                case 3: weigh<kRowCount, 3>(p, values, steps, sums); break;
                case 2: weigh<kRowCount, 2>(p, values, steps, sums); break;
                default: weigh<kRowCount, 1>(p, values, steps, sums);
            }
        }
    }

    template <int kRowCount>
    void point_to_queries(int query, const Word* (&q)[kRows]) {
        for (int r = 0; r < kRows; ++r) {
            const int row = smaller(r, kRowCount - 1);
            const Storage* source = q_ + (query + row) * args_.q.row_stride;
            if constexpr (Product::kConverts) {
                float* copy = queries_ + row * args_.head_size;
                if (row == r)
                    for (int d = 0; d < args_.head_size; d += kLanes)
                        store(copy + d, Io::load(source + d));
                q[r] = copy;
            } else {
                q[r] = reinterpret_cast<const Word*>(source);
            }
        }
    }

    // The scores of kRowCount queries and kVecCount vectors of keys, in units of log 2.
    template <int kRowCount, int kVecCount>
    void score(const Word* const (&q)[kRows], int query, int panel, int begin,
               Vec (&maxima)[kRowCount]) {
        if constexpr (kVecCount <= kPanelVecs) {
            Vec acc[kRowCount][kVecCount];
#pragma GCC unroll 6
            for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVecCount; ++v) acc[r][v] = zeros();
            multiply<Product>(q, keys_ + int64_t{panel - block_} * words_, kPanel, words_, acc);

            const Vec scale = fill(args_.softmax_scale * 1.44269504088896341f);
            const Vec nothing = fill(-__builtin_inff());
            const bool cut = panel + kVecCount * kLanes > seen_to(query) ||
                             panel < seen_from(query + kRowCount - 1);
#pragma GCC unroll 6
            for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < kVecCount; ++v) {
                    const int key = panel + v * kLanes;
                    Vec s = acc[r][v] * scale;
                    if (bias_ != nullptr) s = s + load(bias_ + key - query - r);
                    if (cut)
                        s = keep(s, seen_from(query + r) - key, seen_to(query + r) - key, nothing);
                    store(scores_ + r * kKeyBlock + key - begin, s);
                    maxima[r] = max(s, maxima[r]);
                }
            }
        }
    }

    // A query's scores become probabilities, relative to the largest so far. What was summed before
    // is worth the returned factor.
    float softmax(int r, int query, int count, bool is_first, float largest) {
        const int row = query + r - task_.first_query;
        if (!is_first && maxima_[row] > largest) largest = maxima_[row];
        const float shift = largest == -__builtin_inff() ? 0.0f : largest;
        float* scores = scores_ + r * kKeyBlock;
        Vec sum = zeros();
        for (int i = 0; i < count; i += kLanes) {
            const Vec p = exp2_of_negative<Product::kExact>(load(scores + i) - fill(shift));
            store(scores + i, p);
            sum = sum + p;
        }
        Product::round_probabilities(scores, count);
        float decay = 0;
        if (!is_first) decay = exp2_of_negative<true>(fill(maxima_[row] - shift))[0];
        maxima_[row] = largest;
        sums_[row] = sum_of_lanes(sum) + (is_first ? 0.0f : sums_[row] * decay);
        return decay;
    }

    // Where a tile of sums goes.
    struct Sums {
        int query, dimension;
        bool is_first, is_last;
        const float* decay;
    };

    template <int kRowCount, int kVecCount>
    void weigh(const Word* const (&p)[kRows], const float* values, int steps, const Sums& sums) {
        if constexpr (kVecCount <= kPanelVecs) {
            Vec acc[kRowCount][kVecCount];
            const int row = sums.query - task_.first_query;
            float* context = context_ + int64_t{row} * args_.head_size + sums.dimension;
#pragma GCC unroll 6
            for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVecCount; ++v) acc[r][v] = zeros();
            multiply<Product>(p, values, args_.head_size, steps, acc);
            // What was summed before comes last: the fewer terms a running sum has, the fewer
            // digits it loses.
            if (!sums.is_first)
#pragma GCC unroll 6
                for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < kVecCount; ++v)
                        acc[r][v] = fma(load(context + r * args_.head_size + v * kLanes),
                                        fill(sums.decay[r]), acc[r][v]);
            const int64_t out_stride = int64_t{args_.heads} * args_.head_size;
            Storage* out = static_cast<Storage*>(args_.out) +
                           (task_.start + sums.query) * out_stride +
                           task_.head * args_.head_size + sums.dimension;
#pragma GCC unroll 6
            for (int r = 0; r < kRowCount; ++r) {
                const Vec share = fill(1.0f / sums_[row + r]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecCount; ++v)
                    if (sums.is_last)
                        Io::store(out + r * out_stride + v * kLanes, acc[r][v] * share);
                    else
                        store(context + r * args_.head_size + v * kLanes, acc[r][v]);
            }
        }
    }

    const AttentionArguments& args_;
    const AttentionTask& task_;
    const int words_;
    float *keys_, *values_, *scores_, *queries_, *maxima_, *sums_, *context_;
    const Storage *q_, *k_, *v_;
    const float* bias_;
    int block_ = 0, block_end_ = 0;
};

}  // namespace
}  // namespace encoder_fast::cpu
