// The Python module. Tensors cross as addresses: shapes and dtypes were checked by the wrappers in kernels/*.py.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <utility>

#include "bind_hybridgen.h"
#include "bind_layer.h"
#include "bind_mass.h"
#include "bind_memory.h"
#include "bind_pool.h"
#include "isa.h"
#include "layer.h"
#include "page_memory.h"
#include "page_copy.h"
#include "pool.h"
#include "step.h"

namespace nb = nanobind;

namespace hybridgen {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("no kernel for dtype " + name);
}

struct Rows {  // the row-wise operations of one ISA and dtype
  Rows(const std::string& isa, const std::string& dtype)
      : kernels(find_kernels(isa)), dtype(static_cast<int>(dtype_of(dtype))), bytes(dtype_bytes(dtype_of(dtype))) {}

  void rms_norm(Pool* pool, int64_t rows, int64_t n, uintptr_t x, int64_t x_stride, uintptr_t residual,
                int64_t residual_stride, uintptr_t weight, float eps, uintptr_t out, int64_t out_stride) const {
    RowsTask task{};
    task.x = pointer<void>(x);
    task.x_stride = x_stride;
    task.residual = pointer<void>(residual);
    task.residual_stride = residual_stride;
    task.weight = pointer<void>(weight);
    task.out = pointer<void>(out);
    task.out_stride = out_stride;
    task.n = n;
    task.eps = eps;
    run_rows(pool, kernels.rms_norm[dtype], task, rows, 2 * n * bytes);
  }

  void rotary(Pool* pool, int64_t rows, int64_t half, uintptr_t q, int64_t q_stride, int32_t num_heads, uintptr_t k,
              int64_t k_stride, int32_t num_kv_heads, int32_t head_dim, uintptr_t cos, uintptr_t sin) const {
    RowsTask task{};
    task.heads[0] = pointer<void>(q);
    task.heads[1] = pointer<void>(k);
    task.heads_stride[0] = q_stride;
    task.heads_stride[1] = k_stride;
    task.num_heads[0] = num_heads;
    task.num_heads[1] = num_kv_heads;
    task.head_dim = head_dim;
    task.cos = pointer<float>(cos);
    task.sin = pointer<float>(sin);
    task.n = half;
    run_rows(pool, kernels.rotary[dtype], task, rows, int64_t{num_heads + num_kv_heads} * head_dim * bytes);
  }

  void silu_and_mul(Pool* pool, int64_t rows, int64_t n, uintptr_t x, int64_t x_stride, uintptr_t out,
                    int64_t out_stride) const {
    RowsTask task{};
    task.x = pointer<void>(x);
    task.x_stride = x_stride;
    task.out = pointer<void>(out);
    task.out_stride = out_stride;
    task.n = n;
    run_rows(pool, kernels.silu_and_mul[dtype], task, rows, 3 * n * bytes);
  }

  void merge(Pool* pool, int64_t rows, int64_t n, uintptr_t out_a, uintptr_t lse_a, uintptr_t out_b, uintptr_t lse_b,
             uintptr_t out, uintptr_t lse) const {
    RowsTask task{};
    task.parts[0] = pointer<float>(out_a);
    task.parts[1] = pointer<float>(out_b);
    task.part_lse[0] = pointer<float>(lse_a);
    task.part_lse[1] = pointer<float>(lse_b);
    task.out = pointer<void>(out);
    task.lse = pointer<float>(lse);
    task.n = n;
    run_rows(pool, kernels.merge[dtype], task, rows, n * (8 + bytes));
  }

  const Kernels& kernels;
  int dtype;
  int64_t bytes;
};

}  // namespace

NB_MODULE(_cpu, m) {
  // A pool that lives until the interpreter ends is no leak: engines do, and the kernels chosen per dtype.
  nb::set_leak_warnings(false);
  m.doc() = "Attention over paged KV and row-wise operations on the CPU; wrapped by kernels/attention.py and ops.py.";
  m.def("supported_isas", &supported_isas);

  bind_pool(m);
  bind_mass(m);
  bind_memory(m);
  bind_hybridgen(m);
  bind_layer(m);

  nb::class_<PageMemory>(m, "PageMemory")
      .def(
          "__init__",
          [](PageMemory* self, int32_t num_pages, uintptr_t labels, uintptr_t heat, const std::vector<double>& bandwidths,
             const std::vector<double>& latencies) {
            if (bandwidths.size() != latencies.size()) throw std::invalid_argument("one latency for each bandwidth");
            std::vector<NodeSpeed> speeds;
            for (size_t i = 0; i < bandwidths.size(); ++i) speeds.push_back({bandwidths[i] / 1e9, latencies[i] * 1e9});
            new (self) PageMemory(num_pages, pointer<uint8_t>(labels), pointer<float>(heat), std::move(speeds));
          })
      .def("set_speed",
           [](PageMemory& self, int32_t node, double bandwidth, double latency_s) {
             self.set_speed(node, {bandwidth / 1e9, latency_s * 1e9});
           })
      .def("take", [](PageMemory& self) {
        PageMemory::Counts counts = self.take();
        return std::make_pair(std::move(counts.bytes), std::move(counts.delayed_ns));
      });

  nb::class_<Step>(m, "Step")
      .def(
          "__init__",
          [](Step* self, Pool& pool, int32_t num_layers, int32_t num_kv_heads, int32_t head_dim, int32_t page_size,
             const std::string& dtype, int64_t page_stride, uintptr_t k_pages, uintptr_t v_pages, int32_t first_page, int32_t num_pages,
             int32_t total_pages, int32_t num_seqs,
             uintptr_t query_begin, uintptr_t kv_len, uintptr_t block_table, int64_t max_pages, int32_t num_heads,
             float scale) {
            new (self) Step(pool, Layout{num_layers, num_kv_heads, head_dim, page_size, dtype_of(dtype), page_stride},
                            pointer<std::byte>(k_pages), pointer<std::byte>(v_pages), first_page, num_pages, total_pages, num_seqs,
                            pointer<int32_t>(query_begin), pointer<int32_t>(kv_len), pointer<int32_t>(block_table),
                            max_pages, num_heads, scale);
          },
          nb::keep_alive<1, 2>())
      .def(
          "keep_index",
          [](Step& self, const std::string& isa, uintptr_t index, int64_t index_stride, uintptr_t v_sum,
             int64_t v_sum_stride) {
            self.keep_index({pointer<std::byte>(index), pointer<float>(v_sum), index_stride, v_sum_stride},
                            find_index_kernels(isa));
          })
      .def("keep_memory", &Step::keep_memory, nb::keep_alive<1, 2>())
      .def(
          "store",
          [](Step& self, int32_t layer, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride) {
            self.store(layer, pointer<std::byte>(k), k_stride, pointer<std::byte>(v), v_stride);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "attend",
          [](Step& self, int32_t layer, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride,
             bool out_float32, uintptr_t lse, int32_t sliding_window, float soft_cap) {
            self.attend({layer, pointer<std::byte>(q), q_stride, pointer<std::byte>(out), out_stride, out_float32,
                         pointer<float>(lse), sliding_window, soft_cap});
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "submit",
          [](Step& self, int32_t layer, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride,
             bool out_float32, uintptr_t lse, int32_t sliding_window, float soft_cap) {
            return self.submit({layer, pointer<std::byte>(q), q_stride, pointer<std::byte>(out), out_stride,
                                out_float32, pointer<float>(lse), sliding_window, soft_cap});
          },
          nb::keep_alive<0, 1>(), nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Step::Attend>(m, "Attend")
      .def("wait", &Step::Attend::wait, nb::call_guard<nb::gil_scoped_release>())
      .def("is_done", &Step::Attend::is_done)
      .def("ended_ns", &Step::Attend::ended_ns);

  m.def(
      "copy_pages",
      [](Pool& pool, uintptr_t source_k, uintptr_t source_v, uintptr_t target_k, uintptr_t target_v,
         const std::vector<int32_t>& sources, const std::vector<int32_t>& targets, int64_t half_bytes,
         int64_t source_stride, int64_t target_stride) {
        PageCopy copy(pool, {pointer<std::byte>(source_k), pointer<std::byte>(source_v)},
                      {pointer<std::byte>(target_k), pointer<std::byte>(target_v)}, sources, targets, half_bytes,
                      source_stride, target_stride);
        pool.run(copy);
      },
      nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Rows>(m, "Rows")
      .def(nb::init<const std::string&, const std::string&>(), nb::arg("isa"), nb::arg("dtype"))
      .def("rms_norm", &Rows::rms_norm, nb::arg("pool").none(), nb::arg("rows"), nb::arg("n"), nb::arg("x"),
           nb::arg("x_stride"), nb::arg("residual"), nb::arg("residual_stride"), nb::arg("weight"), nb::arg("eps"),
           nb::arg("out"), nb::arg("out_stride"), nb::call_guard<nb::gil_scoped_release>())
      .def("rotary", &Rows::rotary, nb::arg("pool").none(), nb::arg("rows"), nb::arg("half"), nb::arg("q"),
           nb::arg("q_stride"), nb::arg("num_heads"), nb::arg("k"), nb::arg("k_stride"), nb::arg("num_kv_heads"),
           nb::arg("head_dim"), nb::arg("cos"), nb::arg("sin"), nb::call_guard<nb::gil_scoped_release>())
      .def("merge", &Rows::merge, nb::arg("pool").none(), nb::arg("rows"), nb::arg("n"), nb::arg("out_a"), nb::arg("lse_a"),
           nb::arg("out_b"), nb::arg("lse_b"), nb::arg("out"), nb::arg("lse"), nb::call_guard<nb::gil_scoped_release>())
      .def("silu_and_mul", &Rows::silu_and_mul, nb::arg("pool").none(), nb::arg("rows"), nb::arg("n"), nb::arg("x"),
           nb::arg("x_stride"), nb::arg("out"), nb::arg("out_stride"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace hybridgen
