// Blocks all requests to /admin.

#define ZENTINEL_IMPLEMENTATION
#include "zentinel.hpp"

static zentinel::Decision check(const zentinel::Request &request) {
  if (request.uri().find("/admin") != std::string_view::npos) {
    return zentinel::Decision::block(403, "Forbidden");
  }
  return zentinel::Decision::allow();
}

ZENTINEL_EXPORT(on_request_headers, zentinel::Request, check)
