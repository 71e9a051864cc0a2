// The matrix instructions: fragments as the PTX manual lays them out over the lanes of a warp.

#include "emulation.h"

namespace emulation {

void ldmatrix(uint32_t* fragment, int matrices, bool transposed, uint32_t row) {
    struct Operand {
        uint32_t* fragment;
        int matrices;
        bool transposed;
        uint16_t row[8];
    } mine{fragment, matrices, transposed, {}};
    // The lane that gives an address reads the row.
    if (static_cast<int>(threadIdx.x % 32) < 8 * matrices) load_shared(row, mine.row, 16);
    warp_operation("ldmatrix", 0xffffffffu, &mine, [](void* (&operands)[32]) {
        const auto lane = [&](int i) -> Operand& { return *static_cast<Operand*>(operands[i]); };
        for (int i = 0; i < 32; i++) {
            if (lane(i).matrices != lane(0).matrices || lane(i).transposed != lane(0).transposed) {
                throw Error("lanes differ in the kind of ldmatrix");
            }
            for (int m = 0; m < lane(0).matrices; m++) {
                uint32_t pair[2];
                for (int j = 0; j < 2; j++) {
                    const int r = i / 4, c = 2 * (i % 4) + j;
                    pair[j] = lane(0).transposed ? lane(8 * m + c).row[r] : lane(8 * m + r).row[c];
                }
                lane(i).fragment[m] = pair[0] | pair[1] << 16;
            }
        }
    });
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  float (*to_float)(uint32_t)) {
    struct Operand {
        float* d;
        const uint32_t *a, *b;
        float (*to_float)(uint32_t);
    } mine{d, a, b, to_float};
    warp_operation("mma", 0xffffffffu, &mine, [](void* (&operands)[32]) {
        float left[16][16], right[16][8];
        for (int i = 0; i < 32; i++) {
            const Operand& lane = *static_cast<Operand*>(operands[i]);
            const int g = i / 4, t = 2 * (i % 4);
            for (int r = 0; r < 4; r++) {
                const int row = g + 8 * (r % 2), column = t + 8 * (r / 2);
                left[row][column] = lane.to_float(lane.a[r] & 0xffff);
                left[row][column + 1] = lane.to_float(lane.a[r] >> 16);
            }
            for (int r = 0; r < 2; r++) {
                right[t + 8 * r][g] = lane.to_float(lane.b[r] & 0xffff);
                right[t + 8 * r + 1][g] = lane.to_float(lane.b[r] >> 16);
            }
        }
        float product[16][8] = {};
        for (int row = 0; row < 16; row++) {
            for (int k = 0; k < 16; k++) {
                for (int column = 0; column < 8; column++) {
                    product[row][column] += left[row][k] * right[k][column];
                }
            }
        }
        for (int i = 0; i < 32; i++) {
            const Operand& lane = *static_cast<Operand*>(operands[i]);
            const int g = i / 4, t = 2 * (i % 4);
            for (int r = 0; r < 4; r++) lane.d[r] += product[g + 8 * (r / 2)][t + r % 2];
        }
    });
}

}  // namespace emulation
