// Blocks all requests to /admin.

#define ZENTINEL_IMPLEMENTATION
#include "zentinel.h"

ZN_HOOK(on_request_headers, request, answer) {
  if (zn_contains(zn_text(request, "uri"), "/admin")) {
    zn_block(answer, 403, "Forbidden");
  }
}
