/* The inner loops of a packed pass and of the server's mean, for processors. library.py compiles this file and says how it is called.

   Every number that is computed depends on its own text's or its own owner's rows alone and is a sum in one fixed order: neither the
   neighbours nor the number of threads change a bit. Sums are float32 but for the mean's, which are float64. A tensor of "half" numbers is
   bfloat16; it is widened to float32, computed on, and rounded once at the end.

   Rows are contiguous. N rows, S owners, n texts, H heads of D numbers. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WIDE 8
typedef float vec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef double dvec __attribute__((vector_size(32), aligned(8), may_alias));
typedef float fvec __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* ---- memory of one thread, bfloat16 ---------------------------------------------------------------------------------------------- */

/* `count` floats that are this thread's until it asks again with the same `which`. NULL when memory is short. */
static float *space(int which, int64_t count) {
    static _Thread_local float *kept[6];
    static _Thread_local int64_t held[6];
    if (count > held[which]) {
        free(kept[which]);
        held[which] = 0;
        if (posix_memalign((void **)&kept[which], 64, 4 * (size_t)UP(count, 1024))) return kept[which] = NULL;
        held[which] = UP(count, 1024);
    }
    return kept[which];
}

INLINE float widened(uint16_t half) {
    union { uint32_t bits; float value; } it = {.bits = (uint32_t)half << 16};
    return it.value;
}

/* to the nearest, ties to even; what is no number stays none */
INLINE uint16_t narrowed(float value) {
    union { float value; uint32_t bits; } it = {.value = value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((it.bits + 0x7fff + ((it.bits >> 16) & 1)) >> 16);
}

/* row `row` of (N, width) as floats: where it lies, or widened into `into` */
INLINE const float *floats(const void *from, int64_t row, int64_t rows, int64_t width, int half, float *into) {
    if (!half) return (const float *)from + row * width;
    const uint16_t *halves = (const uint16_t *)from + row * width;
    for (int64_t i = 0; i < rows * width; i++) into[i] = widened(halves[i]);
    return into;
}

INLINE void narrow(const float *from, void *to, int64_t at, int64_t count) {
    uint16_t *halves = (uint16_t *)to + at;
    for (int64_t i = 0; i < count; i++) halves[i] = narrowed(from[i]);
}

/* ---- small products -------------------------------------------------------------------------------------------------------------- */

INLINE void tile(int rows, int wide, int64_t k, const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb, float *c, int64_t ldc,
                 int add) {
    vec sum[6][2];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) sum[i][j] = add ? *(const vec *)(c + i * ldc + j * WIDE) : (vec){0};
    for (int64_t p = 0; p < k; p++) {
        vec right[2];
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) right[j] = *(const vec *)(b + p * ldb + j * WIDE);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int j = 0; j < wide; j++) sum[i][j] += a[i * rs + p * cs] * right[j];
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) *(vec *)(c + i * ldc + j * WIDE) = sum[i][j];
}

/* C (m, n) = or += A (m, k) B (k, n). A's strides are free, B's and C's rows contiguous. */
static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb, float *c,
                    int64_t ldc, int add) {
    int64_t j = 0;
    for (; j + 2 * WIDE <= n; j += 2 * WIDE) {
        int64_t i = 0;
        for (; i + 6 <= m; i += 6) tile(6, 2, k, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
        for (; i < m; i++) tile(1, 2, k, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    }
    for (; j + WIDE <= n; j += WIDE) {
        int64_t i = 0;
        for (; i + 6 <= m; i += 6) tile(6, 1, k, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
        for (; i < m; i++) tile(1, 1, k, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    }
    for (; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            float sum = add ? c[i * ldc + j] : 0;
            for (int64_t p = 0; p < k; p++) sum += a[i * rs + p * cs] * b[p * ldb + j];
            c[i * ldc + j] = sum;
        }
}

/* `rows` rows, `ld` apart, of eight numbers -> eight columns of eight, `width` apart, zero beyond `rows` */
INLINE void turned_block(const float *from, int64_t rows, int64_t ld, float *to, int64_t width) {
    vec r[8], a[8], b[8];
    const ivec even = {0, 8, 1, 9, 4, 12, 5, 13}, odd = {2, 10, 3, 11, 6, 14, 7, 15};
    const ivec left = {0, 1, 8, 9, 4, 5, 12, 13}, right = {2, 3, 10, 11, 6, 7, 14, 15};
    const ivec low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
    for (int i = 0; i < 8; i++) r[i] = i < rows ? *(const vec *)(from + i * ld) : (vec){0};
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], even);
        a[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], odd);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = __builtin_shuffle(a[4 * i + j], a[4 * i + 2 + j], left);
            b[4 * i + 2 * j + 1] = __builtin_shuffle(a[4 * i + j], a[4 * i + 2 + j], right);
        }
    for (int j = 0; j < 4; j++) {
        *(vec *)(to + j * width) = __builtin_shuffle(b[j], b[4 + j], low);
        *(vec *)(to + (4 + j) * width) = __builtin_shuffle(b[j], b[4 + j], high);
    }
}

/* (rows, columns) with rows `ld` apart -> (columns, UP(rows, 8)), zero beyond `rows` */
INLINE void turned(const float *from, int64_t rows, int64_t columns, int64_t ld, float *to) {
    int64_t width = UP(rows, WIDE), whole = columns / WIDE * WIDE;
    for (int64_t i = 0; i < rows; i += WIDE)
        for (int64_t j = 0; j < whole; j += WIDE) {
            if (i + WIDE <= rows) turned_block(from + i * ld + j, WIDE, ld, to + j * width + i, width);
            else turned_block(from + i * ld + j, rows - i, ld, to + j * width + i, width);
        }
    for (int64_t j = whole; j < columns; j++)
        for (int64_t i = 0; i < width; i++) to[j * width + i] = i < rows ? from[i * ld + j] : 0;
}

/* ---- linear layers that every owner has its own of ------------------------------------------------------------------------------- */

#define CHUNK 96

/* y (N, o) = x (N, i) Wᵀ + b, row by row with its owner's W (S, o, i) and b (S, o) or NULL; owner s has the rows starts[s] to starts[s + 1].
   Rows beyond the last owner's become zero. With `kept` (S, most) an owner's W (S, most, i) holds counts[s] rows of W only, kept[s] of them;
   the others are zero, and nothing is computed for them. Without it most = o. Returns 0, or 1 when memory is short. */
int owned_forward(int64_t owners, const int64_t *starts, int64_t total, int64_t in, int64_t out, int64_t most, const int64_t *counts,
                  const int64_t *kept, const void *x, const void *weight, const void *bias, void *y, int half, int threads) {
    int failed = 0;
    int64_t size = half ? 2 : 4;
    memset((char *)y + starts[owners] * out * size, 0, (size_t)((total - starts[owners]) * out * size));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < owners; s++) {
        if (starts[s] == starts[s + 1]) continue;
        int64_t has = kept ? counts[s] : out, wide = UP(has, WIDE);
        const int64_t *place = kept ? kept + s * most : NULL;
        float *across = space(0, in * wide + 1), *rows = space(1, CHUNK * in), *made = space(2, CHUNK * wide + 1);
        float *one = space(3, most * in + out);
        if (!across || !rows || !made || !one) { failed = 1; continue; }
        turned(floats(weight, s * most, has, in, half, one), has, in, in, across);
        const float *mine = bias ? floats(bias, s, 1, out, half, one) : NULL;
        for (int64_t at = starts[s]; at < starts[s + 1]; at += CHUNK) {
            int64_t m = starts[s + 1] - at < CHUNK ? starts[s + 1] - at : CHUNK;
            int straight = !half && wide == out && !place;
            float *to = straight ? (float *)y + at * out : made;
            product(m, wide, in, floats(x, at, m, in, half, rows), in, 1, across, wide, to, wide, 0);
            if (mine)
                for (int64_t i = 0; i < m; i++)
                    for (int64_t o = 0; o < out; o++) to[i * wide + o] += mine[o];
            if (place) memset((char *)y + at * out * size, 0, (size_t)(m * out * size));
            for (int64_t i = 0; i < m && !straight; i++) {
                if (place && half)
                    for (int64_t j = 0; j < has; j++) narrow(to + i * wide + j, y, (at + i) * out + place[j], 1);
                else if (place)
                    for (int64_t j = 0; j < has; j++) ((float *)y)[(at + i) * out + place[j]] = to[i * wide + j];
                else if (half) narrow(to + i * wide, y, (at + i) * out, out);
                else memcpy((float *)y + (at + i) * out, to + i * wide, 4 * (size_t)out);
            }
        }
    }
    return failed;
}

/* Gradients of the same: to_x (N, i) or NULL, to_weight (S, most, i), to_bias (S, o) or NULL, from g (N, o). */
int owned_backward(int64_t owners, const int64_t *starts, int64_t total, int64_t in, int64_t out, int64_t most, const int64_t *counts,
                   const int64_t *kept, const void *g, const void *x, const void *weight, void *to_x, void *to_weight, void *to_bias,
                   int half, int threads) {
    int failed = 0;
    int64_t size = half ? 2 : 4;
    if (to_x) memset((char *)to_x + starts[owners] * in * size, 0, (size_t)((total - starts[owners]) * in * size));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < owners; s++) {
        int64_t all = starts[s + 1] - starts[s], room = half ? 1 : 0, has = kept ? counts[s] : out;
        const int64_t *place = kept ? kept + s * most : NULL;
        float *rows = space(0, room * CHUNK * in), *up = space(1, room * CHUNK * out), *one = space(2, room * most * in);
        float *sums = space(3, out * in + out), *back = space(4, room * CHUNK * in), *few = space(5, place ? CHUNK * out : 0);
        if (!sums || (place && !few) || (half && (!rows || !up || !one || !back))) { failed = 1; continue; }
        float *of_weight = half ? sums : (float *)to_weight + s * most * in, *of_bias = sums + out * in;
        const float *theirs = floats(weight, s * most, has, in, half, one);
        memset(of_weight, 0, 4 * (size_t)(most * in));
        memset(of_bias, 0, 4 * (size_t)out);
        for (int64_t done = 0; done < all; done += CHUNK) {
            int64_t m = all - done < CHUNK ? all - done : CHUNK, at = starts[s] + done;
            const float *from = floats(g, at, m, out, half, up);
            for (int64_t i = 0; i < m && to_bias; i++)
                for (int64_t o = 0; o < out; o++) of_bias[o] += from[i * out + o];
            if (place) {
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < has; j++) few[i * has + j] = from[i * out + place[j]];
                from = few;
            }
            if (to_x) {
                float *to = half ? back : (float *)to_x + at * in;
                product(m, in, has, from, has, 1, theirs, in, to, in, 0);
                if (half) narrow(to, to_x, at * in, m * in);
            }
            product(has, in, m, from, 1, has, floats(x, at, m, in, half, rows), in, of_weight, in, 1);
        }
        if (half) narrow(of_weight, to_weight, s * most * in, most * in);
        if (to_bias && half) narrow(of_bias, to_bias, s * out, out);
        if (to_bias && !half) memcpy((float *)to_bias + s * out, of_bias, 4 * (size_t)out);
    }
    return failed;
}

/* ---- attention within each text -------------------------------------------------------------------------------------------------- */

/* a where the mask is set, b elsewhere */
INLINE vec picked(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* exp of numbers from −87 to 88: 2^n times seven terms of the series for what is left, |r| <= ln 2 / 2 */
INLINE vec exponential(vec x) {
    vec low = (vec){0} - 87.0f;
    x = picked(x < low, low, x);
    vec n = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: what is behind the point falls off */
    ivec whole = (ivec)n - 0x4b400000;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((whole + 127) << 23);
}

INLINE float summed(vec x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

INLINE float largest(vec x) {
    float top = x[0];
    for (int i = 1; i < WIDE; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* softmax of scale · the scores from `begin` to `end` of `wide`; the others become 0 */
INLINE void softmax(float *row, int32_t begin, int32_t end, int64_t wide, float scale) {
    const ivec count = {0, 1, 2, 3, 4, 5, 6, 7};
    vec none = (vec){0} - INFINITY, top = none, sum = {0};
    for (int64_t j = 0; j < wide; j += WIDE) {
        ivec at = count + (int32_t)j, seen = (at >= begin) & (at < end);
        vec score = picked(seen, *(vec *)(row + j), none);
        *(vec *)(row + j) = score;
        top = picked(score > top, score, top);
    }
    float highest = largest(top);
    for (int64_t j = 0; j < wide; j += WIDE) {
        ivec at = count + (int32_t)j, seen = (at >= begin) & (at < end);
        vec e = exponential((*(vec *)(row + j) - highest) * scale);
        e = (vec)((ivec)e & seen);
        *(vec *)(row + j) = e;
        sum += e;
    }
    float share = 1 / summed(sum);
    for (int64_t j = 0; j < wide; j += WIDE) *(vec *)(row + j) *= share;
}

/* out (Q, H, D) = softmax(scale · q kᵀ) v within each text: text t asks with the rows asks[t] to asks[t + 1] of q (Q, H, D), the first of
   which is its token number first[t], and reads the rows reads[t] to reads[t + 1] of k and v (T, shared, D), H / shared heads each.
   Causal: up to itself. window: 0, or the distance from which on nothing is seen. scale > 0. kept: the weights, text by text
   H · asked · UP(read, 8) numbers from places[t] on. */
int attention_forward(int64_t texts, const int64_t *asks, const int64_t *reads, const int64_t *first, const int64_t *places, int64_t heads,
                      int64_t shared, int64_t size, const float *q, const float *k, const float *v, float *out, float *kept, float scale,
                      int causal, int64_t window, int threads) {
    int failed = 0;
    int64_t each = heads / shared;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < texts; t++) {
        int64_t asked = asks[t + 1] - asks[t], read = reads[t + 1] - reads[t], wide = UP(read, WIDE);
        float *across = space(0, size * wide);
        if (!across) { failed = 1; continue; }
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = (reads[t] * shared + h / each) * size, from = (asks[t] * heads + h) * size;
            float *weights = kept + places[t] + h * asked * wide;
            if (h % each == 0) turned(k + at, read, size, shared * size, across);
            product(asked, wide, size, q + from, heads * size, 1, across, wide, weights, wide, 0);
            for (int64_t i = 0; i < asked; i++) {
                int64_t own = first[t] + i, begin = window && own - window + 1 > 0 ? own - window + 1 : 0, end = read;
                if (causal) end = own + 1;
                else if (window && own + window < read) end = own + window;
                softmax(weights + i * wide, begin, end, wide, scale);
            }
            product(asked, size, read, weights, wide, 1, v + at, shared * size, out + from, heads * size, 0);
        }
    }
    return failed;
}

/* Gradients of the same, from g (Q, H, D), the weights and what they were made of. */
int attention_backward(int64_t texts, const int64_t *asks, const int64_t *reads, const int64_t *places, int64_t heads, int64_t shared,
                       int64_t size, const float *g, const float *q, const float *k, const float *v, const float *kept, float *to_q,
                       float *to_k, float *to_v, float scale, int threads) {
    int failed = 0;
    int64_t each = heads / shared;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < texts; t++) {
        int64_t asked = asks[t + 1] - asks[t], read = reads[t + 1] - reads[t], wide = UP(read, WIDE);
        float *across = space(0, size * wide), *scores = space(1, asked * wide);
        if (!across || !scores) { failed = 1; continue; }
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = (reads[t] * shared + h / each) * size, from = (asks[t] * heads + h) * size;
            int64_t of_q = heads * size, of_k = shared * size;
            const float *weights = kept + places[t] + h * asked * wide;
            if (h % each == 0) turned(v + at, read, size, of_k, across);
            product(asked, wide, size, g + from, of_q, 1, across, wide, scores, wide, 0);
            for (int64_t i = 0; i < asked; i++) {
                float *mine = scores + i * wide;
                const float *own = weights + i * wide;
                vec dots = {0};
                for (int64_t j = 0; j < wide; j += WIDE) dots += *(const vec *)(own + j) * *(vec *)(mine + j);
                float dot = summed(dots);
                for (int64_t j = 0; j < wide; j += WIDE)
                    *(vec *)(mine + j) = *(const vec *)(own + j) * (*(vec *)(mine + j) - dot) * scale;
            }
            product(asked, size, read, scores, wide, 1, k + at, of_k, to_q + from, of_q, 0);
            product(read, size, asked, scores, 1, wide, q + from, of_q, to_k + at, of_k, h % each != 0);
            product(read, size, asked, weights, 1, wide, g + from, of_q, to_v + at, of_k, h % each != 0);
        }
    }
    return failed;
}

/* ---- GELU ------------------------------------------------------------------------------------------------------------------------ */

/* x Φ(x), or with g its gradient g (Φ(x) + x φ(x)). The normal distribution by formula 26.2.17 of Abramowitz and Stegun's tables (1964),
   whose error is at most 7.5e-8: Φ(x) = 1 − φ(x) (b1 t + … + b5 t⁵), t = 1 / (1 + 0.2316419 x) for x >= 0. */
INLINE vec gelu_of(vec x, vec g, int back) {
    vec far = picked(x < 0, -x, x);
    vec t = 1.0f / (1.0f + 0.2316419f * far);
    vec p = t * 1.330274429f - 1.821255978f;
    p = p * t + 1.781477937f;
    p = p * t - 0.356563782f;
    p = p * t + 0.319381530f;
    vec density = exponential(-0.5f * x * x) * 0.398942280f;
    vec tail = density * p * t;
    vec below = picked(x < 0, tail, 1.0f - tail);
    return back ? g * (below + x * density) : x * below;
}

#define STEP 512

/* to (count) = GELU of x, or with g not NULL its gradient */
void gelu(int64_t count, const void *x, const void *g, void *to, int half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < count; at += STEP) {
        int64_t m = count - at < STEP ? count - at : STEP;
        float in[STEP], up[STEP], made[STEP];
        const float *from = half || m < STEP ? in : (const float *)x + at, *upstream = half || m < STEP ? up : (const float *)g + at;
        float *into = half || m < STEP ? made : (float *)to + at;
        if (half) {
            for (int64_t i = 0; i < m; i++) in[i] = widened(((const uint16_t *)x)[at + i]);
            for (int64_t i = 0; i < m && g; i++) up[i] = widened(((const uint16_t *)g)[at + i]);
        } else if (m < STEP) {
            memcpy(in, (const float *)x + at, 4 * (size_t)m);
            if (g) memcpy(up, (const float *)g + at, 4 * (size_t)m);
        }
        for (int64_t i = m; i < UP(m, WIDE); i++) in[i] = up[i] = 0;
        if (g)
            for (int64_t i = 0; i < m; i += WIDE) *(vec *)(into + i) = gelu_of(*(const vec *)(from + i), *(const vec *)(upstream + i), 1);
        else
            for (int64_t i = 0; i < m; i += WIDE) *(vec *)(into + i) = gelu_of(*(const vec *)(from + i), (vec){0}, 0);
        if (half) narrow(made, to, at, m);
        else if (m < STEP) memcpy((float *)to + at, made, 4 * (size_t)m);
    }
}

/* ---- the server's mean ----------------------------------------------------------------------------------------------------------- */

#define BLOCK 1024

INLINE void added(int many, double *sums, const float *const *of, const double *weights, int64_t at, int64_t m) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
        dvec sum = *(dvec *)(sums + i);
#pragma GCC unroll 4
        for (int u = 0; u < many; u++) sum += weights[u] * __builtin_convertvector(*(const fvec *)(of[u] + at + i), dvec);
        *(dvec *)(sums + i) = sum;
    }
    for (; i < m; i++)
        for (int u = 0; u < many; u++) sums[i] += weights[u] * (double)of[u][at + i];
}

/* sums (count) += Σ weights[u] · of[u] (count), one after another; a block of the sums stays in the first cache meanwhile */
void weighted_sum(int64_t count, int64_t updates, const float *const *of, const double *weights, double *sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t m = count - at < BLOCK ? count - at : BLOCK, u = 0;
        for (; u + 4 <= updates; u += 4) added(4, sums + at, of + u, weights + u, at, m);
        for (; u < updates; u++) added(1, sums + at, of + u, weights + u, at, m);
    }
}
