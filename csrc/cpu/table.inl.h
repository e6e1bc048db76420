// The table of one instruction set: every loop instantiated for every dtype.

template <class A>
void fill_row(Kernels& t, int dtype) {
  t.pool[dtype] = pooling::pool<A>;
  t.pool_backward[dtype] = pooling::pool_backward<A>;
  t.normalize[dtype] = rows::normalize<A>;
  t.normalize_backward[dtype] = rows::normalize_backward<A>;
  t.pairwise[dtype] = rows::pairwise<A>;
  t.pairwise_backward[dtype] = rows::pairwise_backward<A>;
  t.embed[dtype] = layers::embed<A>;
  t.narrow[dtype] = layers::narrow<A>;
  t.dropout[dtype] = dropout::dropout<A>;
  t.dropout_add_layer_norm[dtype][0] = norm::forward<A, A>;
  t.dropout_add_layer_norm[dtype][1] = norm::forward<A, float>;
  t.dropout_add_layer_norm_backward[dtype][0] = norm::backward<A, A>;
  t.dropout_add_layer_norm_backward[dtype][1] = norm::backward<A, float>;
  t.bias_activation[dtype] = activation::forward<A>;
  t.bias_activation_backward[dtype] = activation::backward<A>;
  t.matrix[dtype][static_cast<int>(Dtype::Float32)] = matrix::block<matrix::Float32Step, A, float>;
  t.matrix[dtype][static_cast<int>(Dtype::BFloat16)] = matrix::block<matrix::Float32Step, A, BFloat16>;
  t.matrix[dtype][static_cast<int>(Dtype::Float16)] = matrix::block<matrix::Float32Step, A, Float16>;
  t.project[dtype] = losses::project<A>;
}

// The kernels of a linear layer's element; rows of y are of the same element or, as in linear_float32, floats.
template <class Step>
void fill_compute(Kernels& t, Compute compute) {
  using Element = typename Step::Element;
  const int i = static_cast<int>(compute);
  t.linear[i] = linear::linear<Step, Element>;
  t.linear_float32[i] = linear::linear<Step, float>;
  t.pack_panel[i][static_cast<int>(Dtype::Float32)] = linear::pack_panel<Step, float>;
  t.pack_panel[i][static_cast<int>(Dtype::BFloat16)] = linear::pack_panel<Step, BFloat16>;
  t.pack_panel[i][static_cast<int>(Dtype::Float16)] = linear::pack_panel<Step, Float16>;
  t.attention[i] = attention::attention<Step>;
  t.attention_backward[i] = attention_backward::backward<Element>;
  t.rotate[i] = layers::rotate<Element>;
  t.gate[i] = layers::gate<Element>;
}

// Filled on first use: a table made at load time would run this instruction set on every machine.
const Kernels& table() {
  static Kernels filled = [] {
    Kernels t = {};
    fill_row<float>(t, static_cast<int>(Dtype::Float32));
    fill_row<BFloat16>(t, static_cast<int>(Dtype::BFloat16));
    fill_row<Float16>(t, static_cast<int>(Dtype::Float16));
    fill_compute<gemm::Float32Step>(t, Compute::Float32);
    fill_compute<gemm::WideBFloat16Step>(t, Compute::BFloat16);
    t.product = product::product;
    t.layer_norm = layers::layer_norm;
    t.peak_float32 = SENTFAST_PEAK_FLOAT32;
    t.contrastive = losses::contrastive;
    t.moments = losses::moments;
    t.search = search::kernels();
    return t;
  }();
  return filled;
}
