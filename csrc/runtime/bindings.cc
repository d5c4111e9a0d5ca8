// The Python module epv2_plugin._C; epv2_plugin/_C.pyi documents it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>

#include "communicator.h"
#include "driver_api.h"
#include "error.h"
#include "launch.h"
#include "nccl_api.h"
#include "stream.h"

namespace py = pybind11;
using namespace epv2;
using Unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

const char* gin_name(ncclGinType_t type) {
  switch (type) {
    case NCCL_GIN_TYPE_NONE: return "none";
    case NCCL_GIN_TYPE_PROXY: return "proxy";
    case NCCL_GIN_TYPE_GDAKI: return "gdaki";
    case NCCL_GIN_TYPE_GPI: return "gpi";
  }
  return "unknown";
}

py::dict properties(Communicator& communicator) {
  Properties found;
  {
    py::gil_scoped_release unlocked;
    found = communicator.properties();
  }
  const ncclCommProperties_t& nccl = found.nccl;
  py::dict result;
  result["rank"] = nccl.rank;
  result["n_ranks"] = nccl.nRanks;
  result["cuda_device"] = nccl.cudaDev;
  result["nvml_device"] = nccl.nvmlDev;
  result["n_lsa_teams"] = nccl.nLsaTeams;
  result["lsa_rank"] = found.lsa.rank;
  result["lsa_size"] = found.lsa.nRanks;
  result["device_api_support"] = nccl.deviceApiSupport;
  result["multimem_support"] = nccl.multimemSupport;
  result["host_rma_support"] = nccl.hostRmaSupport;
  result["gin_type"] = gin_name(nccl.ginType);
  result["railed_gin_type"] = gin_name(nccl.railedGinType);
  return result;
}

size_t checked_size(int64_t num_bytes) {
  if (num_bytes < 1) throw std::invalid_argument("num_bytes = " + std::to_string(num_bytes) + ": must be positive");
  return static_cast<size_t>(num_bytes);
}

ncclDevCommRequirements_t requirements(int lsa_barriers, int gin_contexts, int gin_signals, int gin_counters,
                                       const std::string& gin_connection) {
  static const std::map<std::string, ncclGinConnectionType_t> connections = {
      {"none", NCCL_GIN_CONNECTION_NONE}, {"full", NCCL_GIN_CONNECTION_FULL}, {"rail", NCCL_GIN_CONNECTION_RAIL}};
  const auto connection = connections.find(gin_connection);
  if (connection == connections.end())
    throw std::invalid_argument("gin_connection = \"" + gin_connection + "\": must be \"none\", \"full\" or \"rail\"");
  for (const auto& [name, value] : {std::pair{"lsa_barriers", lsa_barriers}, {"gin_contexts", gin_contexts},
                                    {"gin_signals", gin_signals}, {"gin_counters", gin_counters}})
    if (value < 0) throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + ": must be 0 or more");
  if (connection->second == NCCL_GIN_CONNECTION_NONE && (gin_contexts > 0 || gin_signals > 0 || gin_counters > 0))
    throw std::invalid_argument("gin_contexts, gin_signals and gin_counters need gin_connection \"full\" or \"rail\"");
  ncclDevCommRequirements_t made = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
  made.lsaBarrierCount = lsa_barriers;
  made.ginContextCount = gin_contexts;
  made.ginSignalCount = gin_signals;
  made.ginCounterCount = gin_counters;
  made.ginConnectionType = connection->second;
  return made;
}

void launch(const Function& function, int64_t grid, int64_t block, int64_t shared_bytes, uintptr_t stream,
            const py::bytes& args, int64_t cluster, bool programmatic) {
  const std::string_view bytes = args;
  py::gil_scoped_release unlocked;
  function.launch({grid, block, shared_bytes, cluster, programmatic}, stream, bytes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "NCCL and the CUDA driver, loaded at run time; see _C.pyi";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  m.def("built_against", [] {
    return std::map<std::string, std::string>{{"nccl", nccl_version_text(NCCL_VERSION_CODE)},
                                              {"cuda", cuda_version_text(CUDA_VERSION)}};
  });
  m.def("load_nccl", &load_nccl, py::arg("paths") = std::vector<std::string>());
  m.def("nccl_version", [] { return std::pair(nccl_api().version, nccl_api().path); });
  m.def("driver_version", [] { return cuda_version_text(driver_api().version); });
  m.def("unique_id", [] { return py::bytes(unique_id()); });

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator")
      .def_static("borrow", &Communicator::borrow, py::arg("pointer"), py::arg("timeout_seconds"))
      .def_static(
          "create",
          [](const py::bytes& unique_id, int rank, int size, bool cta_policy_zero, double timeout_seconds) {
            const std::string id = unique_id;
            py::gil_scoped_release unlocked;
            return Communicator::create(id, rank, size, cta_policy_zero, timeout_seconds);
          },
          py::arg("unique_id"), py::arg("rank"), py::arg("size"), py::arg("cta_policy_zero"),
          py::arg("timeout_seconds"))
      .def_property_readonly("pointer", &Communicator::pointer)
      .def_property_readonly("owned", &Communicator::owned)
      .def("properties", &properties)
      .def("async_error", &Communicator::async_error, Unlocked())
      .def(
          "allocate", [](Communicator& self, int64_t num_bytes) { return self.allocate(checked_size(num_bytes)); },
          py::arg("num_bytes"), Unlocked())
      .def(
          "device_communicator",
          [](Communicator& self, int lsa_barriers, int gin_contexts, int gin_signals, int gin_counters,
             const std::string& gin_connection) {
            return self.device_communicator(
                requirements(lsa_barriers, gin_contexts, gin_signals, gin_counters, gin_connection));
          },
          py::arg("lsa_barriers") = 0, py::arg("gin_contexts") = 0, py::arg("gin_signals") = 0,
          py::arg("gin_counters") = 0, py::arg("gin_connection") = "none", Unlocked())
      .def("close", &Communicator::close, Unlocked())
      .def("abort", &Communicator::abort, Unlocked())
      .def("forget", &Communicator::forget, Unlocked());

  py::class_<Window, std::shared_ptr<Window>>(m, "Window")
      .def("register", &Window::enroll, py::arg("ordered") = false, Unlocked())
      .def_property_readonly("pointer", &Window::pointer)
      .def_property_readonly("handle", &Window::handle)
      .def_property_readonly("num_bytes", &Window::num_bytes)
      .def("lsa_pointer", &Window::lsa_pointer, py::arg("peer"), py::arg("offset") = 0, Unlocked())
      .def("close", &Window::close, Unlocked());

  py::class_<DeviceCommunicator, std::shared_ptr<DeviceCommunicator>>(m, "DeviceCommunicator")
      .def_property_readonly("data", [](const DeviceCommunicator& self) { return py::bytes(self.data()); })
      .def_property_readonly("pointer", &DeviceCommunicator::pointer)
      .def_property_readonly("gin_contexts", &DeviceCommunicator::gin_contexts)
      .def("close", &DeviceCommunicator::close, Unlocked());

  py::class_<Mapped>(m, "Mapped")
      .def(py::init([](int64_t num_bytes) { return std::make_unique<Mapped>(checked_size(num_bytes)); }),
           py::arg("num_bytes"))
      .def_property_readonly("host_pointer", &Mapped::host_pointer)
      .def_property_readonly("pointer", &Mapped::pointer)
      .def_property_readonly("num_bytes", &Mapped::num_bytes)
      .def("close", &Mapped::close);

  py::class_<SharedMapped>(m, "SharedMapped")
      .def(py::init([](int file, int64_t num_bytes) {
             const size_t size = checked_size(num_bytes);
             py::gil_scoped_release unlocked;  // page-locking many pages takes a while
             return std::make_unique<SharedMapped>(file, size);
           }),
           py::arg("file"), py::arg("num_bytes"))
      .def_property_readonly("pointer", &SharedMapped::pointer)
      .def_property_readonly("host_pointer", &SharedMapped::host_pointer)
      .def_property_readonly("num_bytes", &SharedMapped::num_bytes)
      .def("close", &SharedMapped::close, Unlocked());

  py::class_<Stream>(m, "Stream")
      .def(py::init<bool>(), py::arg("high_priority") = true)
      .def_property_readonly("pointer", &Stream::pointer)
      .def("close", &Stream::close, Unlocked());

  py::class_<Event>(m, "Event")
      .def(py::init<>())
      .def_property_readonly("handle", &Event::handle)
      .def("passed", &Event::passed);

  // They may wait for room on the stream.
  m.def("copy", &copy, py::arg("target"), py::arg("source"), py::arg("num_bytes"), py::arg("stream"), Unlocked());
  m.def("fill", &fill, py::arg("target"), py::arg("byte"), py::arg("num_bytes"), py::arg("stream"), Unlocked());
  m.def("stream_operations", &stream_operations, py::arg("stream"), py::arg("operations"), Unlocked());
  m.def("compare_exchange", &compare_exchange, py::arg("address"), py::arg("expected"), py::arg("desired"));
  m.def("current_context", &current_context);
  m.def("set_context", &set_context, py::arg("context"));

  py::class_<Module, std::shared_ptr<Module>>(m, "Module")
      .def_static(
          "load",
          [](const py::bytes& cubin) {
            const std::string code = cubin;
            py::gil_scoped_release unlocked;
            return Module::load(code);
          },
          py::arg("cubin"))
      .def("function", &Module::function, py::arg("name"));

  py::class_<Function, std::shared_ptr<Function>>(m, "Function")
      .def_readonly("name", &Function::name)
      .def_readonly("registers", &Function::registers)
      .def_readonly("static_shared_bytes", &Function::static_shared_bytes)
      .def_readonly("local_bytes", &Function::local_bytes)
      .def_readonly("max_threads", &Function::max_threads)
      .def_readonly("max_dynamic_shared_bytes", &Function::max_dynamic_shared_bytes)
      .def_readonly("args_bytes", &Function::args_bytes)
      .def("launch", &launch, py::arg("grid"), py::arg("block"), py::arg("shared_bytes"), py::arg("stream"),
           py::arg("args"), py::arg("cluster") = 1, py::arg("programmatic") = false);
}
