/* Products for ARM's NEON: the few instructions that the loops of panels.h and thin.h are made of. */
#include "scales.h"

#ifdef MINIPEFT_ARM
#include <arm_neon.h>
#include <string.h>

#define TARGET
#define LANES 4
#define VECTORS 4
#define ROWS_AT_ONCE(M) ((M) > 3 ? 2 : 4)

typedef float32x4_t Floats;
typedef uint32x4_t Words;
/* 16 numbers in the 64 bytes that `tbl` chooses from. */
typedef uint8x16x4_t Table;

INLINE Floats load(const float *from) { return vld1q_f32(from); }
INLINE void store(float *to, Floats x) { vst1q_f32(to, x); }
INLINE Floats broadcast(float x) { return vdupq_n_f32(x); }
INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
INLINE float sum_of_lanes(Floats x) { return vaddvq_f32(x); }

/* A word's bits as a number's, and its halves as bfloat16 numbers. */
INLINE Floats as_floats(Words words) { return vreinterpretq_f32_u32(words); }
INLINE Floats low_half(Words words) { return as_floats(vshlq_n_u32(words, 16)); }
INLINE Floats high_half(Words words) { return as_floats(vandq_u32(words, vdupq_n_u32(0xffff0000))); }

INLINE Floats load_some(const float *from, int64_t count) {
    float some[LANES] = {0};
    memcpy(some, from, count * sizeof(float));
    return vld1q_f32(some);
}
INLINE Floats load_bfloat16(const uint16_t *from) { return as_floats(vshll_n_u16(vld1_u16(from), 16)); }
/* A group of 32 weights is never cut: rows are whole blocks. */
INLINE Words load_words(const uint8_t *codes, int lanes) {
    (void)lanes;
    return vreinterpretq_u32_u8(vld1q_u8(codes));
}

INLINE Table table_of(const float *levels) { return vld1q_u8_x4((const uint8_t *)levels); }
INLINE Table scaled(Table levels, float scale) {
    Table table;
    for (int i = 0; i < 4; i++)
        table.val[i] = vreinterpretq_u8_f32(vmulq_n_f32(vreinterpretq_f32_u8(levels.val[i]), scale));
    return table;
}
/* Of each lane's number, below 16, the bytes 4 i .. 4 i + 3. */
INLINE Floats choose(Table table, Words index) {
    Words bytes = vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
}
INLINE Floats look_up(Table table, Words words, int bit) {
    return choose(table, vandq_u32(vshlq_u32(words, vdupq_n_s32(-bit)), vdupq_n_u32(15)));
}
/* Two bytes in every lane, shifted so that lane i has weight i in its lowest bits. */
INLINE Floats neighbours(Table table, const uint8_t *codes) {
    static const int32_t shifts[4] = {-4, 0, -12, -8};
    uint16_t two;
    memcpy(&two, codes, 2);
    return choose(table, vandq_u32(vshlq_u32(vdupq_n_u32(two), vld1q_s32(shifts)), vdupq_n_u32(15)));
}

/* 32 weights from each of 4 rows of W -> 4 words of 8 weights, lane i from row i. */
INLINE void transpose_words(const uint8_t *const *rows, int64_t byte, Words *words) {
    Words q[4];
    for (int i = 0; i < 4; i++)
        q[i] = load_words(rows[i] + byte, LANES);
    uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(q[0], q[1])), b = vreinterpretq_u64_u32(vtrn2q_u32(q[0], q[1]));
    uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(q[2], q[3])), d = vreinterpretq_u64_u32(vtrn2q_u32(q[2], q[3]));
    words[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    words[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    words[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    words[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

/* The scale of the block that a group is in: 32 weights are within one. */
INLINE Floats spread_scales(const float *near, int shift, int lanes) {
    (void)shift, (void)lanes;
    return broadcast(*near);
}

/* The lanes of each of four registers added up. */
INLINE void add_lanes(float sums[][LANES], float *y) {
    store(y, vpaddq_f32(vpaddq_f32(load(sums[0]), load(sums[1])), vpaddq_f32(load(sums[2]), load(sums[3]))));
}

#define scales_of_blocks each_scale
#include "panels.h"
#include "thin.h"

static const Kernels KERNELS = {GROUP, strip_float32, spread_float32, thin_low, thin_float32, widen, thin_dense, 0, 0, 0};
const Kernels *neon_kernels(void) { return &KERNELS; }
#endif
