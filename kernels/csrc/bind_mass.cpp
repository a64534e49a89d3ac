// The index of K and the mass policy in Python; wrapped by kernels/index.py and kernels/policies/mass.py.
#include "bind_mass.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "index.h"
#include "isa.h"
#include "mass.h"
#include "pool.h"

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
  throw std::invalid_argument("no index for dtype " + name);
}

struct IndexPages {  // a tier's K, V and index, page first
  IndexPages(const std::string& dtype, int32_t num_layers, int32_t num_kv_heads, int32_t head_dim, int32_t page_size,
             int64_t page_stride, uintptr_t index, int64_t index_stride, uintptr_t v_sum, int64_t v_sum_stride)
      : dtype(dtype_of(dtype)),
        num_heads(num_layers * num_kv_heads),
        head_dim(head_dim),
        page_size(page_size),
        piece_bytes(page_size / kIndexGroup * index_group_bytes(head_dim)),
        page_stride(page_stride),
        index{pointer<std::byte>(index), pointer<float>(v_sum), index_stride, v_sum_stride} {}

  void build(Pool& pool, const std::string& isa, uintptr_t k, uintptr_t v, const std::vector<int64_t>& pages) const {
    struct Call {
      const IndexPages& self;
      const IndexKernels& kernels;
      const std::byte* k;
      const std::byte* v;
      const std::vector<int64_t>& pages;
    };
    const Call call{*this, find_index_kernels(isa), pointer<std::byte>(k), pointer<std::byte>(v), pages};
    const int64_t bytes = int64_t{2} * page_size * head_dim * num_heads * dtype_bytes(dtype);
    pool.run(
        static_cast<int32_t>(pages.size()),
        [](const void* context, int32_t item, std::byte*) {
          const Call& c = *static_cast<const Call*>(context);
          const IndexPages& self = c.self;
          const auto dtype = static_cast<int>(self.dtype);
          const int64_t half = int64_t{self.page_size} * self.head_dim * dtype_bytes(self.dtype);
          for (int32_t head = 0; head < self.num_heads; ++head) {
            const int64_t page = c.pages[item];
            const int64_t offset = page * self.page_stride * dtype_bytes(self.dtype) + head * half;
            c.kernels.quantize[dtype](c.k + offset, self.head_dim, self.page_size, 0, self.head_dim,
                                      self.index.k + page * self.index.k_stride + head * self.piece_bytes);
            c.kernels.sum_page[dtype](c.v + offset, self.page_size, self.head_dim,
                                      self.index.v_sum + page * self.index.v_sum_stride + int64_t{head} * self.head_dim);
          }
        },
        &call, 0, static_cast<int64_t>(pages.size()) * bytes < (int64_t{256} << 10));
  }

  ScanTask task(const IndexQuery& query, int32_t layer_head, const std::vector<int32_t>& block_table,
                int32_t num_tokens, int32_t num_sinks) const {
    ScanTask task{};
    task.index = index.k + layer_head * piece_bytes;
    task.page_stride = index.k_stride;
    task.block_table = block_table.data();
    task.page_size = page_size;
    task.head_dim = head_dim;
    task.num_tokens = num_tokens;
    task.num_sinks = num_sinks;
    task.query = query;
    return task;
  }

  IndexQuery prepare(const IndexKernels& kernels, uintptr_t q, int32_t group, float scale, float soft_cap,
                     std::vector<std::byte>& memory) const {
    memory.resize(static_cast<size_t>(index_query_bytes(group, head_dim)));
    return kernels.prepare[static_cast<int>(dtype)](pointer<void>(q), group, head_dim, scale, soft_cap, memory.data());
  }

  void estimate(const std::string& isa, uintptr_t q, int32_t group, float scale, float soft_cap, int32_t layer_head,
                const std::vector<int32_t>& block_table, int32_t num_tokens, uintptr_t out) const {
    const IndexKernels& kernels = find_index_kernels(isa);
    std::vector<std::byte> memory;
    const IndexQuery query = prepare(kernels, q, group, scale, soft_cap, memory);
    const ScanTask scan = task(query, layer_head, block_table, num_tokens, 0);
    std::vector<std::byte> scratch(static_cast<size_t>(scan_scratch_bytes(group, head_dim)));
    for (int32_t unit = 0; unit * kIndexUnit < num_tokens; ++unit) {
      kernels.estimate(scan, unit, pointer<float>(out) + int64_t{unit} * group * kIndexUnit, scratch.data());
    }
  }

  std::tuple<bool, std::vector<int32_t>, std::vector<float>, std::vector<float>> select(
      const std::string& isa, uintptr_t q, int32_t group, float scale, float soft_cap, int32_t layer_head,
      const std::vector<int32_t>& block_table, int32_t num_tokens, int32_t num_sinks, int32_t always_begin,
      double mass) const {
    const IndexKernels& kernels = find_index_kernels(isa);
    std::vector<std::byte> memory;
    const IndexQuery query = prepare(kernels, q, group, scale, soft_cap, memory);
    Selection selection = hybridgen::select(
        kernels, {task(query, layer_head, block_table, num_tokens, num_sinks), always_begin, mass});
    return {selection.estimated, std::move(selection.tokens), std::move(selection.lse), std::move(selection.rest)};
  }

  Dtype dtype;
  int32_t num_heads;  // of all layers
  int32_t head_dim;
  int32_t page_size;
  int64_t piece_bytes;
  int64_t page_stride;  // elements, of K and V
  Index index;
};

}  // namespace

void bind_mass(nb::module_& m) {
  m.def("index_group_bytes", &index_group_bytes, nb::arg("head_dim"));

  nb::class_<IndexPages>(m, "IndexPages")
      .def(nb::init<const std::string&, int32_t, int32_t, int32_t, int32_t, int64_t, uintptr_t, int64_t, uintptr_t,
                    int64_t>(),
           nb::arg("dtype"), nb::arg("num_layers"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("page_size"),
           nb::arg("page_stride"), nb::arg("index"), nb::arg("index_stride"), nb::arg("v_sum"), nb::arg("v_sum_stride"))
      .def("build", &IndexPages::build, nb::arg("pool"), nb::arg("isa"), nb::arg("k"), nb::arg("v"), nb::arg("pages"),
           nb::call_guard<nb::gil_scoped_release>())
      .def("estimate", &IndexPages::estimate, nb::arg("isa"), nb::arg("q"), nb::arg("group"), nb::arg("scale"),
           nb::arg("soft_cap"), nb::arg("layer_head"), nb::arg("block_table"), nb::arg("num_tokens"), nb::arg("out"))
      .def("select", &IndexPages::select, nb::arg("isa"), nb::arg("q"), nb::arg("group"), nb::arg("scale"),
           nb::arg("soft_cap"), nb::arg("layer_head"), nb::arg("block_table"), nb::arg("num_tokens"),
           nb::arg("num_sinks"), nb::arg("always_begin"), nb::arg("mass"));

  // Of all layers, since the last read: count, sum, minimum, scanned, attended, widened, full, foretold, rescanned.
  using StatsTuple = std::tuple<int64_t, double, double, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
  nb::class_<MassRecord>(m, "MassRecord")
      .def(
          "__init__",
          [](MassRecord* self, int32_t num_layers) {
            new (self) MassRecord{std::vector<MassStats>(static_cast<size_t>(num_layers))};
          },
          nb::arg("num_layers"))
      .def("read", [](MassRecord& self) {
        std::vector<StatsTuple> layers;
        for (MassStats& layer : self.layers) {
          layers.emplace_back(layer.count, layer.sum, layer.minimum, layer.scanned, layer.attended, layer.widened,
                              layer.full, layer.foretold, layer.rescanned);
          layer = {};
        }
        return layers;
      });

  nb::class_<MassStep>(m, "MassStep")
      .def(
          "__init__",
          [](MassStep* self, const Step& step, const std::string& isa, double mass, double floor, bool tail,
             int32_t num_sinks, int32_t min_tokens, MassRecord& record) {
            new (self) MassStep(step, isa, {mass, floor, tail, num_sinks, min_tokens}, record);
          },
          nb::arg("step"), nb::arg("isa"), nb::arg("mass"), nb::arg("floor"), nb::arg("tail"), nb::arg("num_sinks"),
          nb::arg("min_tokens"), nb::arg("record"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 9>())
      .def_prop_ro("num_scanned", &MassStep::num_scanned)
      .def(
          "submit",
          [](MassStep& self, int32_t layer, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride,
             uintptr_t lse, float soft_cap, std::shared_ptr<MassStep::Foretelling> foretelling) {
            const nb::gil_scoped_release unlocked;
            return self.submit({layer, pointer<std::byte>(q), q_stride, pointer<std::byte>(out), out_stride, true,
                                pointer<float>(lse), 0, soft_cap},
                               std::move(foretelling));
          },
          nb::arg("layer"), nb::arg("q"), nb::arg("q_stride"), nb::arg("out"), nb::arg("out_stride"), nb::arg("lse"),
          nb::arg("soft_cap"), nb::arg("foretelling").none(), nb::keep_alive<0, 1>())
      .def_prop_ro("scanned_rows", &MassStep::scanned_rows)
      .def(
          "foretell",
          [](MassStep& self, int32_t layer, uintptr_t q, int64_t q_stride, float soft_cap) {
            return self.foretell(layer, pointer<std::byte>(q), q_stride, soft_cap);
          },
          nb::arg("layer"), nb::arg("q"), nb::arg("q_stride"), nb::arg("soft_cap"), nb::keep_alive<0, 1>(),
          nb::call_guard<nb::gil_scoped_release>());

  nb::class_<MassStep::Foretelling>(m, "MassForetelling").def("is_done", &MassStep::Foretelling::is_done);
  nb::class_<MassStep::Attend>(m, "MassAttend")
      .def("wait", &MassStep::Attend::wait, nb::call_guard<nb::gil_scoped_release>())
      .def("is_done", &MassStep::Attend::is_done)
      .def("ended_ns", &MassStep::Attend::ended_ns);
}

}  // namespace hybridgen
