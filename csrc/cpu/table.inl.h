// The table of one instruction set: every loop instantiated for every dtype.

template <class A>
void fill_row(Kernels& t, int dtype) {
  t.pool[dtype] = pooling::pool<A>;
  t.pool_backward[dtype] = pooling::pool_backward<A>;
  t.normalize[dtype] = rows::normalize<A>;
  t.normalize_backward[dtype] = rows::normalize_backward<A>;
  t.pairwise[dtype] = rows::pairwise<A>;
  t.pairwise_backward[dtype] = rows::pairwise_backward<A>;
  t.matrix[dtype][static_cast<int>(Dtype::Float32)] = matrix::block<matrix::Float32Step, A, float>;
  t.matrix[dtype][static_cast<int>(Dtype::BFloat16)] = matrix::block<matrix::Float32Step, A, BFloat16>;
  t.matrix[dtype][static_cast<int>(Dtype::Float16)] = matrix::block<matrix::Float32Step, A, Float16>;
}

// Filled on first use: a table made at load time would run this instruction set on every machine.
const Kernels& table() {
  static Kernels filled = [] {
    Kernels t = {};
    fill_row<float>(t, static_cast<int>(Dtype::Float32));
    fill_row<BFloat16>(t, static_cast<int>(Dtype::BFloat16));
    fill_row<Float16>(t, static_cast<int>(Dtype::Float16));
    t.peak_float32 = SENTFAST_PEAK_FLOAT32;
    return t;
  }();
  return filled;
}
