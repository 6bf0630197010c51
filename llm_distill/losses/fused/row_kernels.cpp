// Losses and gradients of rows of logits on a CPU, compiled at the first use for the machine and the divergence at hand.
//
// cpp_backend.py defines REAL (float or double), STUDENT_LOGIT and TEACHER_LOGIT (the types of the raw logits: REAL or
// another, or bfloat16), IS_PLAIN (neither a bias nor post-processing: raw logits are logits), and FORMULA, the divergence's
// φ and ψ as statements. A row goes through a few short passes; what lies between them stays in the cache of the core.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#define VECTORISED __attribute__((simd("notinbranch"), const, nothrow))
extern "C" {
VECTORISED float expf(float);
VECTORISED float expm1f(float);
VECTORISED float logf(float);
VECTORISED float log1pf(float);
VECTORISED float tanhf(float);
VECTORISED double exp(double);
VECTORISED double expm1(double);
VECTORISED double log(double);
VECTORISED double log1p(double);
VECTORISED double tanh(double);
}

struct bfloat16 { uint16_t bits; };
using real = REAL;
using student_logit = STUDENT_LOGIT;
using teacher_logit = TEACHER_LOGIT;

namespace {

const long BLOCK = 2048;  // what is summed in `real` before it is added in double
const real EXCLUDED = -1e29;  // logits below are marks of tokens that do not take part
const real NOTHING = -1e30;

inline float exp_(float x) { return expf(x); }
inline double exp_(double x) { return exp(x); }
inline float expm1_(float x) { return expm1f(x); }
inline double expm1_(double x) { return expm1(x); }
inline float log_(float x) { return logf(x); }
inline double log_(double x) { return log(x); }
inline float log1p_(float x) { return log1pf(x); }
inline double log1p_(double x) { return log1p(x); }
inline float tanh_(float x) { return tanhf(x); }
inline double tanh_(double x) { return tanh(x); }
// eˣ for x ≤ 0, in half the time of the library's: 2ⁿ · eʳ, with the series of eʳ for |r| ≤ ½ log 2. 0 below e⁻⁸⁸.
inline double exp_negative(double x) { return exp(x); }
inline float exp_negative(float x) {
    x = x < -88 ? -88 : x;
    const float n = std::nearbyint(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const int32_t bits = int32_t(n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return power * ((((((r * (1 / 720.f) + 1 / 120.f) * r + 1 / 24.f) * r + 1 / 6.f) * r + 0.5f) * r + 1) * r + 1);
}
inline real abs_(real x) { return x < 0 ? -x : x; }
inline real sign_(real x) { return (x > 0 ? real(1) : real(0)) - (x < 0 ? real(1) : real(0)); }
inline real max_(real a, real b) { return a > b ? a : b; }
inline real min_(real a, real b) { return a < b ? a : b; }
inline real floored(real x) { return x < NOTHING ? NOTHING : x; }  // log 0 as a number; NaN stays NaN

inline real read(float x) { return x; }
inline real read(double x) { return real(x); }
inline real read(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void write(float* to, real x) { *to = float(x); }
inline void write(double* to, real x) { *to = x; }
inline uint16_t rounded(float x) {  // to the nearest bfloat16, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void write(bfloat16* to, real x) { to->bits = rounded(float(x)); }

}  // namespace

struct Side {  // logits = post_process(raw + bias)
    void* raw;  // [rows, vocab]
    const real* bias;  // [vocab] or null
    double scale, cap;  // cap = 0: none
    long stride;  // from one row of `raw` to the next
};

struct Dense {
    Side student, teacher;
    student_logit* gradient;  // [rows, vocab], as far apart as the student's raw logits, or these; null: not wanted
    const int64_t* targets;  // [rows] or null
    const real* log_outside;  // [rows], log Σ e^z over the student's rows past the vocabulary; null: there are none
    double temperature, kd_slope, ce_weight, outside_weight;
    real *kd, *entropy, *kl, *acceptance, *agreement, *confidence, *teacher_confidence;  // [rows]
    real *ce, *teacher_ce, *correct, *teacher_correct;  // [rows]; unused without targets
    real* log_total;  // [rows], log Σ e^z over the vocabulary; unused without `log_outside`
    long vocab;
};

struct Statistics {
    Side student;
    double temperature, most, threshold;
    const real* start;  // [rows], of the draw; unused without a threshold
    real *maximum, *log_total, *tempered_log_total, *mean;  // [rows]
    real* values;  // [rows, most]: the largest first and of equals the one of smaller id, or those drawn
    int64_t* ids;  // −1 where a row has fewer
    long vocab;
};

struct Gradient {
    Side student;
    student_logit* gradient;  // [rows, vocab], as far apart as the student's raw logits
    double temperature;
    const real *maximum, *slope, *log_total, *slope_T, *tempered_log_total;  // [rows]; slope_T null: the first pair alone
    long vocab;
};

struct Halves {  // of numbers of 32 bits: [rows, vocab]
    uint16_t *high, *low;
    const bfloat16* product;
    double is_last;
    long vocab;
};

namespace {

#define BLOCKS for (long begin = 0, end = BLOCK < V ? BLOCK : V; begin < V; begin = end, end = end + BLOCK < V ? end + BLOCK : V)
#define EACH for (long i = begin; i < end; i++)
#define SIMD(...) _Pragma(#__VA_ARGS__)

// Rows shared out over the threads that the products run in: they wait for more work in a loop, and any other thread
// would have to share their cores.
template <class Arguments>
void share_out(const Arguments* args, long rows, int threads, void (*part)(const Arguments&, long, long)) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++) part(*args, rows * i / threads, rows * (i + 1) / threads);
}
#define EXPORTED(name, Arguments) \
    extern "C" void name(const Arguments* args, long rows, int threads) { share_out(args, rows, threads, name##_rows); }

template <class logit>
struct Logits {
    const logit* z;
    real operator[](long i) const { return read(z[i]); }
};

// A row's logits: where they are the raw ones, read from the product as they are; otherwise made in `scratch`.
template <class logit>
auto logits_of(const Side& side, long row, long V, real* scratch) {
    const logit* raw = static_cast<const logit*>(side.raw) + row * side.stride;
#if IS_PLAIN
    return Logits<logit>{raw};
#else
    const real *bias = side.bias, scale = side.scale, cap = side.cap;
    SIMD(omp simd)
    for (long i = 0; i < V; i++) {
        real x = read(raw[i]), z = (bias ? x + bias[i] : x) * scale;
        if (cap) z = cap * tanh_(z / cap);
        scratch[i] = x < EXCLUDED ? NOTHING : z;
    }
    return Logits<real>{scratch};
#endif
}

template <class Row>
real maximum_of(Row z, long V) {
    real highest = 2 * NOTHING;
    SIMD(omp simd reduction(max : highest))
    for (long i = 0; i < V; i++) highest = max_(highest, z[i]);
    return highest;
}

// exps = e^((z − maximum) / T); returns their sum.
template <class Row>
double exponentials(Row z, long V, real maximum, real inverse_T, real* exps) {
    double total = 0;
    BLOCKS {
        real sum = 0;
        SIMD(omp simd reduction(+ : sum))
        EACH {
            real e = exp_negative((z[i] - maximum) * inverse_T);
            exps[i] = e;
            sum += e;
        }
        total += sum;
    }
    return total;
}

// ∂ logits / ∂ (raw + bias), times the gradient on the logits, on its way out.
template <class Row>
void store(const Side& side, Row z, const real* d, long V, student_logit* out) {
    const real scale = side.scale, cap = side.cap;
    SIMD(omp simd)
    for (long i = 0; i < V; i++) {
        const real t = z[i] / cap < -1 ? -1 : z[i] / cap;  // tanh; where the logit is NOTHING the slope is 0
        write(out + i, d[i] * (cap ? scale * (1 - t * t) : scale));
    }
}

// A side of a row after `exponentials`: log_softmax(i) = (z[i] − maximum) / T − log_total, softmax(i) = exps[i] · scale.
struct Softmax {
    real maximum, inverse_T, log_total, scale;
    template <class Row>
    Softmax(Row z, long V, real maximum, real inverse_T, real* exps) : maximum(maximum), inverse_T(inverse_T) {
        const double total = exponentials(z, V, maximum, inverse_T, exps);
        log_total = std::log(total), scale = 1 / total;
    }
};

struct Sums { double entropy = 0, kl = 0, acceptance = 0, value = 0, slopes = 0; real nearest = 2 * NOTHING; };

// What two distributions are to each other (LIKENESS), and their divergence, which leaves q and ψ in q_ and p_ (LOSS).
template <bool LIKENESS, bool LOSS, class Student, class Teacher>
void compare(const Softmax s, const Softmax t, long V, Student z, Teacher y, real* q_, real* p_, Sums& sums) {
    real nearest = 2 * NOTHING;
    BLOCKS {
        real h = 0, k = 0, both = 0, v = 0, slopes = 0;
        SIMD(omp simd reduction(+ : h, k, both, v, slopes) reduction(max : nearest))
        EACH {
            const real q = q_[i] * s.scale, p = p_[i] * t.scale;
            const real to_z = floored(z[i] - s.maximum), to_y = floored(y[i] - t.maximum);
            const real log_q = to_z * s.inverse_T - s.log_total, log_p = to_y * t.inverse_T - t.log_total;
            if (LIKENESS) {
                h += q * log_q;
                k += p * (log_p - log_q);
                both += min_(p, q);
                nearest = max_(nearest, to_z + to_y);  // 0 where both have their maximum
            }
            if (LOSS) {
                FORMULA
                v += phi;
                slopes += psi;
                q_[i] = q;
                p_[i] = psi;
            }
        }
        sums.entropy -= h, sums.kl += k, sums.acceptance += both, sums.value += v, sums.slopes += slopes;
    }
    if (LIKENESS) sums.nearest = nearest;
}

// One row against the teacher's. q_ and p_ hold first exponentials, then q and ψ.
template <class Student, class Teacher>
void dense_row(const Dense& a, long row, Student z, Teacher y, real* q_, real* p_, real* q_1) {
    const long V = a.vocab;
    const bool tempered = a.temperature != 1, with_ce = a.gradient && a.ce_weight != 0;
    const bool with_q_1 = a.gradient && (a.ce_weight != 0 || a.log_outside);  // q at temperature 1 is in the gradient
    const real inverse_T = 1 / a.temperature, kd_slope = a.kd_slope, ce_weight = a.ce_weight;
    const Softmax q(z, V, maximum_of(z, V), 1, q_), p(y, V, maximum_of(y, V), 1, p_);
    Sums sums;
    if (tempered)
        compare<true, false>(q, p, V, z, y, q_, p_, sums);
    else
        compare<true, true>(q, p, V, z, y, q_, p_, sums);
    a.entropy[row] = sums.entropy, a.kl[row] = sums.kl, a.acceptance[row] = sums.acceptance;
    a.agreement[row] = sums.nearest == 0, a.confidence[row] = q.scale, a.teacher_confidence[row] = p.scale;
    if (a.targets) {
        const real z_target = z[a.targets[row]] - q.maximum, y_target = y[a.targets[row]] - p.maximum;
        a.ce[row] = q.log_total - z_target, a.teacher_ce[row] = p.log_total - y_target;
        a.correct[row] = z_target == 0, a.teacher_correct[row] = y_target == 0;
    }
    real on_q_1 = ce_weight;
    if (a.log_outside) {
        const double log_total = double(q.maximum) + q.log_total;
        a.log_total[row] = log_total;
        on_q_1 -= a.outside_weight / (1 + std::exp(log_total - a.log_outside[row]));
    }
    if (tempered) {
        if (with_q_1) {
            SIMD(omp simd)
            for (long i = 0; i < V; i++) q_1[i] = on_q_1 * q.scale * q_[i];
        }
        const Softmax q_T(z, V, q.maximum, inverse_T, q_), p_T(y, V, p.maximum, inverse_T, p_);
        compare<false, true>(q_T, p_T, V, z, y, q_, p_, sums);
    }
    a.kd[row] = sums.value;
    if (!a.gradient) return;

    const real on_q = -kd_slope * real(sums.slopes) + (tempered ? 0 : on_q_1);
    student_logit* out = a.gradient + row * a.student.stride;
    if (!with_ce && !(tempered && with_q_1) && IS_PLAIN) {
        SIMD(omp simd)
        for (long i = 0; i < V; i++) write(out + i, kd_slope * p_[i] + on_q * q_[i]);
        return;
    }
    SIMD(omp simd)
    for (long i = 0; i < V; i++) p_[i] = kd_slope * p_[i] + on_q * q_[i] + (tempered && with_q_1 ? q_1[i] : 0);
    if (with_ce) p_[a.targets[row]] -= ce_weight;
    store(a.student, z, p_, V, out);
}

void dense_rows(const Dense& a, long first, long last) {
    const long V = a.vocab;
    std::unique_ptr<real[]> memory(new real[5 * V]);
    real *q_ = memory.get(), *p_ = q_ + V, *q_1 = p_ + V, *z_ = q_1 + V, *y_ = z_ + V;
    for (long row = first; row < last; row++)
        dense_row(a, row, logits_of<student_logit>(a.student, row, V, z_), logits_of<teacher_logit>(a.teacher, row, V, y_),
                  q_, p_, q_1);
}

const long LANES = 256, STRIP = 64;

long lanes_for(long k) { return 4 * k <= LANES ? LANES : 2 * lanes_for((k + 1) / 2); }

struct Token {
    real value;
    int64_t id;
    bool operator<(const Token& other) const { return value > other.value || (value == other.value && id < other.id); }
};

void write_top(Token* tokens, long count, long k, real* values, int64_t* ids) {
    std::partial_sort(tokens, tokens + std::min(k, count), tokens + count);
    std::fill(tokens + std::min(k, count), tokens + k, Token{2 * NOTHING, -1});
    for (long i = 0; i < k; i++) values[i] = tokens[i].value, ids[i] = tokens[i].id;
}

// The tokens i, i + lanes, i + 2 lanes, … make a lane. At least k tokens reach the k-th largest of the lanes' maxima, and
// few more than k do: those are sought in a second pass and sorted. Returns the maximum of all; NaN is passed over.
template <class Row>
real top_of(Row z, long V, long k, real* values, int64_t* ids, real* lane, Token* tokens) {
    const long lanes = lanes_for(k);
    std::fill(lane, lane + lanes, 2 * NOTHING);
    for (long start = 0; start < V; start += lanes) {
        const long n = std::min(lanes, V - start);
        SIMD(omp simd)
        for (long i = 0; i < n; i++) lane[i] = z[start + i] > lane[i] ? z[start + i] : lane[i];
    }
    real maximum = 2 * NOTHING;
    for (long i = 0; i < lanes; i++) maximum = max_(maximum, lane[i]);
    std::nth_element(lane, lane + lanes - k, lane + lanes);
    const real least = lane[lanes - k];
    long count = 0;
    for (long start = 0; start < V; start += STRIP) {
        const long end = std::min(start + STRIP, V);
        int reach = 0;
        SIMD(omp simd reduction(+ : reach))
        for (long i = start; i < end; i++) reach += z[i] >= least;
        for (long i = start; reach && i < end; i++)
            if (z[i] >= least) tokens[count++] = {z[i], i};
    }
    write_top(tokens, count, k, values, ids);
    return maximum;
}

// Every token with the probability min(1, p / threshold): where the sum of these, from `sum` on, passes a whole number.
// A strip that passes none is not looked at any closer.
template <class Row>
void draw_of(Row z, long V, real maximum, real inverse_T, real log_total, real threshold, double sum, long most,
             real* values, int64_t* ids) {
    const real log_certain = log_total + std::log(threshold);
    long count = 0;
    for (long first = 0; first < V; first += STRIP) {
        const long n = std::min(STRIP, V - first);
        real share[STRIP], strip = 0;
        SIMD(omp simd reduction(+ : strip))
        for (long i = 0; i < n; i++) {
            share[i] = exp_negative(min_((z[first + i] - maximum) * inverse_T - log_certain, 0));
            strip += share[i];
        }
        if (std::floor(sum + strip) == std::floor(sum)) {
            sum += strip;
            continue;
        }
        for (long i = 0; i < n && count < most; i++) {
            const double before = std::floor(sum);
            sum += share[i];
            if (std::floor(sum) != before) values[count] = z[first + i], ids[count++] = first + i;
        }
    }
    std::fill(values + count, values + most, 2 * NOTHING);
    std::fill(ids + count, ids + most, -1);
}

template <class Row>
void statistics_row(const Statistics& a, long row, Row z, real* lane, Token* tokens) {
    const long V = a.vocab, most = a.most;
    const bool tempered = a.temperature != 1;
    const real inverse_T = 1 / a.temperature;
    const bool drawn = a.threshold != 0;
    real* values = a.values + row * most;
    int64_t* ids = a.ids + row * most;
    const real maximum = most && !drawn ? top_of(z, V, most, values, ids, lane, tokens) : maximum_of(z, V);
    double total = 0, weighted = 0, total_T = 0;
    BLOCKS {
        real sum = 0, mean = 0, sum_T = 0;
        SIMD(omp simd reduction(+ : sum, mean))
        EACH {
            const real e = exp_negative(z[i] - maximum);
            sum += e;
            mean += e * floored(z[i] - maximum);
        }
        total += sum, weighted += mean;
        if (!tempered) continue;
        SIMD(omp simd reduction(+ : sum_T))
        EACH sum_T += exp_negative((z[i] - maximum) * inverse_T);
        total_T += sum_T;
    }
    a.maximum[row] = maximum;
    a.mean[row] = weighted / total;
    a.log_total[row] = std::log(total);
    a.tempered_log_total[row] = std::log(tempered ? total_T : total);
    if (drawn) draw_of(z, V, maximum, inverse_T, a.tempered_log_total[row], a.threshold, a.start[row], most, values, ids);
}

template <class Row>
void gradient_row(const Gradient& a, long row, Row z, real* d) {
    const long V = a.vocab;
    student_logit* out = a.gradient + row * a.student.stride;
    const real inverse_T = 1 / a.temperature, maximum = a.maximum[row], slope = a.slope[row], log_total = a.log_total[row];
    if (a.slope_T) {
        const real slope_T = a.slope_T[row], log_total_T = a.tempered_log_total[row];
        SIMD(omp simd)
        for (long i = 0; i < V; i++) {
            const real x = z[i] - maximum;
            d[i] = slope * exp_negative(x - log_total) + slope_T * exp_negative(x * inverse_T - log_total_T);
        }
    } else if (IS_PLAIN) {
        SIMD(omp simd)
        for (long i = 0; i < V; i++) write(out + i, slope * exp_negative(z[i] - maximum - log_total));
        return;
    } else {
        SIMD(omp simd)
        for (long i = 0; i < V; i++) d[i] = slope * exp_negative(z[i] - maximum - log_total);
    }
    store(a.student, z, d, V, out);
}

void statistics_rows(const Statistics& a, long first, long last) {
    const long V = a.vocab;
    std::unique_ptr<real[]> z_(new real[V]), lane(new real[lanes_for(a.most)]);
    std::unique_ptr<Token[]> tokens(new Token[V]);
    for (long row = first; row < last; row++)
        statistics_row(a, row, logits_of<student_logit>(a.student, row, V, z_.get()), lane.get(), tokens.get());
}

void gradient_rows(const Gradient& a, long first, long last) {
    const long V = a.vocab;
    std::unique_ptr<real[]> memory(new real[2 * V]);
    real *d = memory.get(), *z_ = d + V;
    for (long row = first; row < last; row++) gradient_row(a, row, logits_of<student_logit>(a.student, row, V, z_), d);
}

template <bool LAST>
void add_halves_of(const Halves& a, long begin, long end) {
    uint16_t *high = a.high, *low = a.low;
    const bfloat16* product = a.product;
    SIMD(omp simd)
    for (long i = begin; i < end; i++) {
        uint32_t bits = uint32_t(high[i]) << 16 | low[i];
        float sum;
        std::memcpy(&sum, &bits, 4);
        sum += float(read(product[i]));
        std::memcpy(&bits, &sum, 4);
        if (LAST)
            high[i] = rounded(sum);
        else
            high[i] = bits >> 16, low[i] = uint16_t(bits);
    }
}

void add_halves_rows(const Halves& a, long first, long last) {
    a.is_last ? add_halves_of<true>(a, first * a.vocab, last * a.vocab)
              : add_halves_of<false>(a, first * a.vocab, last * a.vocab);
}

}  // namespace

EXPORTED(dense, Dense)
EXPORTED(statistics, Statistics)
EXPORTED(gradient, Gradient)
EXPORTED(add_halves, Halves)
