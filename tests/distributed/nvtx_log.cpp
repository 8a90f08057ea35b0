// An NVTX tool: writes "+name" and "-" to $MOETUNER_RANGES_LOG where a range of moetuner opens and
// closes. A process loads it when NVTX_INJECTION64_PATH names it. NCCL and others keep domains of
// their own, which are left out; ours are "moetuner", from Python, and the default one, from C++.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <nvtx3/nvToolsExt.h>

namespace {

int write_line(const char* mark, const char* name) {
  static std::FILE* file = std::fopen(std::getenv("MOETUNER_RANGES_LOG"), "w");
  std::fprintf(file, "%s%s\n", mark, name);
  return std::fflush(file);
}

int push(const char* name) { return write_line("+", name); }

int pop() { return write_line("-", ""); }

// Domains and registered strings: their names are their handles.
template <typename Handle>
Handle keep(const char* name) {
  return reinterpret_cast<Handle>(strdup(name));
}

nvtxDomainHandle_t make_domain(const char* name) { return keep<nvtxDomainHandle_t>(name); }

nvtxStringHandle_t register_string(nvtxDomainHandle_t, const char* text) {
  return keep<nvtxStringHandle_t>(text);
}

bool is_ours(nvtxDomainHandle_t domain) {
  return domain != nullptr && std::strcmp(reinterpret_cast<const char*>(domain), "moetuner") == 0;
}

int push_in(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* range) {
  if (!is_ours(domain)) return 0;
  const bool registered = range->messageType == NVTX_MESSAGE_TYPE_REGISTERED;
  return push(registered ? reinterpret_cast<const char*>(range->message.registered)
                         : range->message.ascii);
}

int pop_in(nvtxDomainHandle_t domain) { return is_ours(domain) ? pop() : 0; }

template <typename Function>
void replace(NvtxFunctionTable table, int index, Function* function) {
  *table[index] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  const void* found = export_table(NVTX_ETID_CALLBACKS);
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(found);
  NvtxFunctionTable core = nullptr, domains = nullptr;
  unsigned size = 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &core, &size)) return 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &domains, &size)) return 0;
  replace(core, NVTX_CBID_CORE_RangePushA, push);
  replace(core, NVTX_CBID_CORE_RangePop, pop);
  replace(domains, NVTX_CBID_CORE2_DomainCreateA, make_domain);
  replace(domains, NVTX_CBID_CORE2_DomainRegisterStringA, register_string);
  replace(domains, NVTX_CBID_CORE2_DomainRangePushEx, push_in);
  replace(domains, NVTX_CBID_CORE2_DomainRangePop, pop_in);
  return 1;
}
