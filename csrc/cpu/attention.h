// Variable-length bidirectional attention over packed tokens on the CPU:
//
//     out = softmax(softmax_scale * q kᵀ + bias[distance]) v
//
// within each sequence and head, and within a window of distances where there is one. Rows behind
// the last sequence become zeros.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace encoder_fast::cpu {

// (total, heads, head_size) with a head's elements side by side; strides in elements.
struct Heads {
    const void* data;
    int64_t row_stride;
    int64_t head_stride;
};

struct AttentionArguments {
    Heads q, k, v;
    void* out;                  // (total, heads, head_size), contiguous
    const int32_t* cu_seqlens;  // (batch + 1,)
    int total;
    int batch;
    int max_seqlen;
    int heads;
    int head_size;  // a multiple of 16
    float softmax_scale;
    int window;         // the largest distance that is seen; negative: all are
    // Null, or of each head and distance from 1 - max_seqlen on, in units of log 2; readable for
    // kBiasBeyond floats behind the distance max_seqlen - 1.
    const float* bias;
    int64_t bias_stride;  // from head to head
    DType dtype;          // of q, k, v and out
    float* workspace;     // attention_workspace(head_size) floats for each thread
};

constexpr int kBiasBeyond = 64;

// Keys whose scores are held at a time, queries that meet them together, and the most queries of
// one task.
constexpr int kKeyBlock = 256;
constexpr int kRows = 6;
constexpr int kQueryChunk = 768;

// One head of one sequence, or some of its queries.
struct AttentionTask {
    int64_t start;  // of the sequence, a row of q, k, v and out
    int length;
    int head;
    int first_query, last_query;
};

// In floats, for one thread.
int64_t attention_workspace(int head_size);

// False, and nothing is written, if cu_seqlens is empty, does not begin with 0, falls, ends behind
// total or has a sequence longer than max_seqlen.
bool attention(const AttentionArguments& arguments, int isa, int threads);

}  // namespace encoder_fast::cpu
