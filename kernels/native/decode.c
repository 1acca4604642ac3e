/* Packed weights to numbers, bit for bit as the reference does: level[code] * scale in float32, rounded once to the
 * result's type.
 *
 * A block has 16 different results. They are computed and rounded once, and a weight is then one look-up in that
 * table: of 16 floats in one register (AVX-512), of 32 halves likewise, or of two registers of 8 floats (AVX2).
 */
#include "nf4.h"

#include <string.h>

/* IEEE half precision, rounded to nearest even. */
static uint16_t to_float16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) { /* below 2^-14: a multiple of 2^-24, which float32's own rounding finds */
        float scaled;
        memcpy(&scaled, &magnitude, 4);
        scaled += 0.5f;
        memcpy(&magnitude, &scaled, 4);
        return sign | (uint16_t)(magnitude - 0x3f000000);
    }
    uint32_t odd = magnitude >> 13 & 1;
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + odd) >> 13);
}

static void scaled_levels(const Weight *w, int64_t block, float *table) {
    float scale = scale_of(w, block);
    for (int i = 0; i < 16; i++)
        table[i] = w->levels[i] * scale;
}

static void round_table(const float *table, uint16_t *halves, int dtype) {
    for (int i = 0; i < 16; i++)
        halves[i] = dtype == BFLOAT16 ? to_bfloat16(table[i]) : to_float16(table[i]);
}

/* Any range within one block. */
static void decode_part(const Weight *w, int64_t block, int64_t first, int64_t last, void *out, int dtype) {
    float table[16];
    uint16_t halves[16];
    scaled_levels(w, block, table);
    if (dtype != FLOAT32)
        round_table(table, halves, dtype);
    for (int64_t i = first; i < last; i++) {
        int code = w->codes[i >> 1] >> (i & 1 ? 0 : 4) & 15;
        if (dtype == FLOAT32)
            ((float *)out)[i - first] = table[code];
        else
            ((uint16_t *)out)[i - first] = halves[code];
    }
}

static void decode_scalar(const Weight *w, int64_t block, void *out, int dtype) {
    decode_part(w, block, block * w->blocksize, (block + 1) * w->blocksize, out, dtype);
}

#ifdef MINIPEFT_X86
TARGET_AVX2 static void decode_avx2(const Weight *w, int64_t block, void *out, int dtype) {
    const uint8_t *codes = w->codes + block * w->blocksize / 2;
    __m256 scale = _mm256_set1_ps(scale_of(w, block));
    __m256 low = _mm256_mul_ps(_mm256_loadu_ps(w->levels), scale);
    __m256 high = _mm256_mul_ps(_mm256_loadu_ps(w->levels + 8), scale);
    if (dtype == FLOAT32) {
        /* Four bytes in every lane, shifted so that lane i has weight i in its lowest bits. */
        __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        for (int64_t i = 0; i < w->blocksize; i += 8) {
            int32_t word;
            memcpy(&word, codes + i / 2, 4);
            __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
            /* vpermps reads the lowest 3 bits; the fourth, moved to the sign, chooses the half. */
            __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            __m256 found =
                _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), top);
            _mm256_storeu_ps((float *)out + i, found);
        }
        return;
    }
    float table[16];
    uint16_t halves[16];
    uint8_t planes[2][16];
    _mm256_storeu_ps(table, low);
    _mm256_storeu_ps(table + 8, high);
    round_table(table, halves, dtype);
    for (int i = 0; i < 16; i++) {
        planes[0][i] = (uint8_t)halves[i];
        planes[1][i] = (uint8_t)(halves[i] >> 8);
    }
    /* The low and the high bytes of the 16 results: each a byte shuffle. */
    __m128i lows = _mm_loadu_si128((const __m128i *)planes[0]), highs = _mm_loadu_si128((const __m128i *)planes[1]);
    __m128i mask = _mm_set1_epi8(15);
    for (int64_t i = 0; i < w->blocksize; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i / 2));
        __m128i earlier = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), later = _mm_and_si128(bytes, mask);
        __m128i order[2] = {_mm_unpacklo_epi8(earlier, later), _mm_unpackhi_epi8(earlier, later)};
        for (int half = 0; half < 2; half++) {
            __m128i a = _mm_shuffle_epi8(lows, order[half]), b = _mm_shuffle_epi8(highs, order[half]);
            __m128i *to = (__m128i *)((uint16_t *)out + i + 16 * half);
            _mm_storeu_si128(to, _mm_unpacklo_epi8(a, b));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(a, b));
        }
    }
}

/* To nearest even in integers: vcvtneps2bf16 would take subnormal numbers for zeros. */
TARGET_AVX512 INLINE __m256i round_bfloat16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i quiet = _mm512_set1_epi32(0x7fc00000);
    sum = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

TARGET_AVX512 static void decode_avx512(const Weight *w, int64_t block, void *out, int dtype) {
    const uint8_t *codes = w->codes + block * w->blocksize / 2;
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(w->levels), _mm512_set1_ps(scale_of(w, block)));
    if (dtype == FLOAT32) {
        /* 8 bytes in every lane pair: the first 8 lanes take the first 4 of them, shifted to their own nibble.
         * vpermps reads the lowest 4 bits. */
        __m512i words = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        for (int64_t i = 0; i < w->blocksize; i += 16) {
            int64_t eight;
            memcpy(&eight, codes + i / 2, 8);
            __m512i spread = _mm512_permutexvar_epi32(words, _mm512_set1_epi64(eight));
            __m512 found = _mm512_permutexvar_ps(_mm512_srlv_epi32(spread, shifts), table);
            _mm512_storeu_ps((float *)out + i, found);
        }
        return;
    }
    __m256i rounded = dtype == BFLOAT16 ? round_bfloat16(table) : _mm512_cvtps_ph(table, _MM_FROUND_TO_NEAREST_INT);
    /* The table twice: vpermw reads 5 bits, of which the fifth is not ours. */
    __m512i twice = _mm512_broadcast_i64x4(rounded);
    for (int64_t i = 0; i < w->blocksize; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512((uint16_t *)out + i, _mm512_permutexvar_epi16(index, twice));
    }
}
#endif

static void decode_block(const Weight *w, int64_t block, void *out, int dtype, int level) {
#ifdef MINIPEFT_X86
    if (level >= AVX512) {
        decode_avx512(w, block, out, dtype);
        return;
    }
    if (level == AVX2) {
        decode_avx2(w, block, out, dtype);
        return;
    }
#endif
    (void)level;
    decode_scalar(w, block, out, dtype);
}

void decode(const Weight *w, int64_t first, int64_t last, void *out, int dtype, int level) {
    int64_t size = w->blocksize, bytes = dtype == FLOAT32 ? 4 : 2;
    char *to = out;
    for (int64_t i = first; i < last;) {
        int64_t block = i / size, end = (block + 1) * size;
        if (end > last)
            end = last;
        if (end - i == size)
            decode_block(w, block, to, dtype, level);
        else
            decode_part(w, block, i, end, to, dtype);
        to += (end - i) * bytes;
        i = end;
    }
}
