// zentinel.h - write policies for the Zentinel proxy's Wasm agent in C.
//
// Copy this file into your project. In exactly one source file, define ZENTINEL_IMPLEMENTATION
// before you include it.
//
//     #define ZENTINEL_IMPLEMENTATION
//     #include "zentinel.h"
//
//     ZN_HOOK(on_request_headers, request, answer) {
//       if (zn_contains(zn_text(request, "uri"), "/admin")) {
//         zn_block(answer, 403, "Forbidden");
//       }
//     }
//
// If a hook sets nothing in its answer, the event passes unchanged. The hooks are
// on_request_headers, on_request_body, on_response_headers, on_response_body, on_websocket_frame,
// on_guardrail_inspect, on_request_complete and on_configure. Each takes a JSON object: the agent's
// documentation lists its fields.
//
// This header works with and without a C library. The values that its functions return are valid
// until the hook returns.
//
// SPDX-License-Identifier: Apache-2.0

#ifndef ZENTINEL_H
#define ZENTINEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// UTF-8 text. It is not null-terminated and may contain zero bytes.
typedef struct {
  const char *data;
  size_t size;
} zn_str;

// A JSON value of the event. A missing value has size 0.
typedef struct {
  const char *data;
  size_t size;
} zn_value;

// The answer of a hook.
typedef struct zn_answer zn_answer;

typedef enum { ZN_TRACE, ZN_DEBUG, ZN_INFO, ZN_WARN, ZN_ERROR } zn_level;

// ---- Reading events -----------------------------------------------------------------------------

// The text of a field; empty if the field is missing or not a string.
zn_str zn_text(zn_value object, const char *name);
// The value of a field if it is a non-negative integer, else `otherwise`.
uint64_t zn_number(zn_value object, const char *name, uint64_t otherwise);
// Whether a field is true.
bool zn_flag(zn_value object, const char *name);
// The last field of this name, of any type.
zn_value zn_get(zn_value object, const char *name);
// Whether a value exists.
bool zn_exists(zn_value value);
// The text of a value; empty if it is not a string.
zn_str zn_as_text(zn_value value);

// The value of a header; empty if it is missing. Ignores the case of the name. Multiple values are
// joined.
zn_str zn_header(zn_value event, const char *name);
// Whether a header exists, even if it is empty.
bool zn_has_header(zn_value event, const char *name);
// Gets a value of a header by index, from 0; false if there are no more.
bool zn_header_value(zn_value event, const char *name, size_t index, zn_str *value);
// The bytes of a body chunk or of the payload of a WebSocket frame.
zn_str zn_body(zn_value event);

// Iterates over the members of an object or the elements of an array:
//
//     zn_iterator each = zn_each(object);
//     while (zn_next(&each)) { … each.name … each.value … }
typedef struct {
  zn_value value;
  zn_str name; // only of a member
  zn_value container;
  size_t at;
} zn_iterator;
zn_iterator zn_each(zn_value container);
bool zn_next(zn_iterator *iterator);

// ---- Comparing ----------------------------------------------------------------------------------

bool zn_equal(zn_str text, const char *other);
bool zn_equal_ignoring_case(zn_str text, const char *other);
bool zn_starts_with(zn_str text, const char *prefix);
bool zn_contains(zn_str text, const char *part);
// Ignores ASCII case.
bool zn_contains_ignoring_case(zn_str text, const char *part);

// ---- Answering ----------------------------------------------------------------------------------

// These functions take null-terminated text, and those with the suffix `_str` any text.

void zn_allow(zn_answer *answer);
void zn_block(zn_answer *answer, unsigned status, const char *body);
void zn_block_str(zn_answer *answer, unsigned status, zn_str body);
// Redirects the client. The status is 301, 302, 303, 307 or 308.
void zn_redirect(zn_answer *answer, unsigned status, const char *url);
void zn_redirect_str(zn_answer *answer, unsigned status, zn_str url);
// Challenges the client, for example with a "captcha".
void zn_challenge(zn_answer *answer, const char *type);
void zn_challenge_param(zn_answer *answer, const char *name, const char *value);
void zn_challenge_param_str(zn_answer *answer, const char *name, zn_str value);

void zn_set_request_header(zn_answer *answer, const char *name, const char *value);
void zn_set_request_header_str(zn_answer *answer, const char *name, zn_str value);
// Appends a value to a header and keeps the existing values.
void zn_append_request_header(zn_answer *answer, const char *name, const char *value);
void zn_append_request_header_str(zn_answer *answer, const char *name, zn_str value);
void zn_remove_request_header(zn_answer *answer, const char *name);
void zn_set_response_header(zn_answer *answer, const char *name, const char *value);
void zn_set_response_header_str(zn_answer *answer, const char *name, zn_str value);
// Sets a header, such as Set-Cookie, to several values.
void zn_set_response_header_list(zn_answer *answer, const char *name, const zn_str *values, size_t count);
// Appends a value to a header and keeps the existing values, such as the cookies of the upstream.
void zn_append_response_header(zn_answer *answer, const char *name, const char *value);
void zn_append_response_header_str(zn_answer *answer, const char *name, zn_str value);
void zn_remove_response_header(zn_answer *answer, const char *name);

// For the audit log.
void zn_tag(zn_answer *answer, const char *tag);
void zn_rule_id(zn_answer *answer, const char *rule_id);
void zn_reason_code(zn_answer *answer, const char *reason_code);
void zn_confidence(zn_answer *answer, double from_0_to_1);

void zn_routing(zn_answer *answer, const char *name, const char *value);
// Marks the decision as not final: the hook for the body decides.
void zn_needs_more(zn_answer *answer);
void zn_replace_request_body(zn_answer *answer, zn_str body);
void zn_drop_request_body(zn_answer *answer);
void zn_replace_response_body(zn_answer *answer, zn_str body);
// The agent treats this as a module error unless the chunk is empty, because the proxy would send
// the original.
void zn_drop_response_body(zn_answer *answer);
void zn_drop_frame(zn_answer *answer);
void zn_close_websocket(zn_answer *answer, unsigned code, const char *reason);
// In on_configure: rejects the configuration.
void zn_reject_configuration(zn_answer *answer, const char *reason);
// Sets any other field, such as "guardrail_response", to JSON.
void zn_json_field(zn_answer *answer, const char *name, const char *json);

// ---- Logging, errors and memory -----------------------------------------------------------------

// Writes a line to the agent's log.
void zn_log(zn_level level, const char *message);
// Logs why the module cannot decide, then traps: the agent's failure mode decides instead.
__attribute__((noreturn)) void zn_fail(const char *message);
// Allocates memory that is freed when the hook returns. Never returns NULL: if no memory is left,
// the call ends as with zn_fail.
void *zn_scratch(size_t size);

typedef void zn_hook(zn_value event, zn_answer *answer);
uint64_t zn_call(zn_hook *hook, char *json, size_t size);

// Defines the function that the agent calls for a hook.
#define ZN_HOOK(hook, event, answer)                                                                                   \
  static void zn_##hook(zn_value event, zn_answer *answer);                                                            \
  __attribute__((export_name(#hook))) uint64_t zn_export_##hook(char *json, size_t size) {                             \
    return zn_call(zn_##hook, json, size);                                                                             \
  }                                                                                                                    \
  static void zn_##hook(zn_value event, zn_answer *answer)

#ifdef __cplusplus
}
#endif

#endif // ZENTINEL_H

#ifdef ZENTINEL_IMPLEMENTATION
#undef ZENTINEL_IMPLEMENTATION

#ifdef __cplusplus
extern "C" {
#endif

__attribute__((import_module("zentinel"), import_name("log"))) void zn_import_log(int32_t level, const char *message,
                                                                                  size_t size);

// ---- Memory -------------------------------------------------------------------------------------

#ifdef __wasi__

#include <stdlib.h>

// Blocks that are freed when the hook returns. Each is preceded by a link to the previous one.
typedef struct zn_block_link {
  struct zn_block_link *before;
  uint64_t align;
} zn_block_link;

static zn_block_link *zn_blocks;

void *zn_scratch(size_t size) {
  zn_block_link *block = (zn_block_link *)malloc(sizeof(zn_block_link) + size);
  if (!block) {
    zn_fail("out of memory");
  }
  block->before = zn_blocks;
  zn_blocks = block;
  return block + 1;
}

static void zn_free_scratch(void) {
  while (zn_blocks) {
    zn_block_link *before = zn_blocks->before;
    free(zn_blocks);
    zn_blocks = before;
  }
}

__attribute__((export_name("alloc"))) void *zn_export_alloc(size_t size) { return malloc(size ? size : 1); }

__attribute__((export_name("dealloc"))) void zn_export_dealloc(void *pointer, size_t size) {
  (void)size;
  free(pointer);
}

#else

// Without a C library, memory is a stack above the module's data. The stack is reset when the agent
// has freed all memory that it was handed, which it does after each call.
extern char __heap_base;
static uintptr_t zn_top;
static unsigned zn_handed_out;

static void *zn_push(size_t size) {
  enum { PAGE = 65536, ALIGN = 16 };
  if (!zn_top) {
    zn_top = ((uintptr_t)&__heap_base + ALIGN - 1) & ~(uintptr_t)(ALIGN - 1);
  }
  uint64_t end = ((uint64_t)zn_top + size + ALIGN - 1) & ~(uint64_t)(ALIGN - 1);
  uint64_t have = (uint64_t)__builtin_wasm_memory_size(0) * PAGE;
  if (end > UINT32_MAX) {
    return NULL;
  }
  if (end > have && __builtin_wasm_memory_grow(0, (size_t)((end - have + PAGE - 1) / PAGE)) == (size_t)-1) {
    return NULL;
  }
  void *block = (void *)zn_top;
  zn_top = (uintptr_t)end;
  return block;
}

void *zn_scratch(size_t size) {
  void *block = zn_push(size);
  if (!block) {
    zn_fail("out of memory");
  }
  return block;
}

static void zn_free_scratch(void) {}

__attribute__((export_name("alloc"))) void *zn_export_alloc(size_t size) {
  void *block = zn_push(size);
  if (block) {
    zn_handed_out += 1;
  }
  return block;
}

__attribute__((export_name("dealloc"))) void zn_export_dealloc(void *pointer, size_t size) {
  (void)size;
  if (pointer && zn_handed_out > 0) {
    zn_handed_out -= 1;
    if (zn_handed_out == 0) {
      zn_top = 0;
    }
  }
}

#endif

static void zn_copy(char *to, const char *from, size_t size) { __builtin_memcpy(to, from, size); }

static size_t zn_size(const char *text) {
  size_t size = 0;
  while (text[size]) {
    size += 1;
  }
  return size;
}

static zn_str zn_from(const char *text) {
  zn_str str = {text, text ? zn_size(text) : 0};
  return str;
}

void zn_log(zn_level level, const char *message) { zn_import_log((int32_t)level, message, zn_size(message)); }

void zn_fail(const char *message) {
  zn_log(ZN_ERROR, message);
  __builtin_trap();
}

// ---- Reading JSON -------------------------------------------------------------------------------

// Scans JSON, validated or not. Invalid JSON ends the call; the agent sends none.
typedef struct {
  const char *at;
  const char *end;
} zn_scanner;

__attribute__((noreturn)) static void zn_invalid(void) { zn_fail("the event is not valid JSON"); }

static char zn_peek(const zn_scanner *scanner) { return scanner->at < scanner->end ? *scanner->at : 0; }

static void zn_skip_space(zn_scanner *scanner) {
  while (scanner->at < scanner->end &&
         (*scanner->at == ' ' || *scanner->at == '\n' || *scanner->at == '\r' || *scanner->at == '\t')) {
    scanner->at += 1;
  }
}

static bool zn_take(zn_scanner *scanner, char byte) {
  if (zn_peek(scanner) != byte) {
    return false;
  }
  scanner->at += 1;
  return true;
}

static int zn_hex(char digit) {
  if (digit >= '0' && digit <= '9') {
    return digit - '0';
  }
  digit |= 0x20;
  return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

// Reads four hexadecimal digits, or returns -1.
static int32_t zn_hex4(const char *at, const char *end) {
  if (end - at < 4) {
    return -1;
  }
  int32_t unit = 0;
  for (int digit = 0; digit < 4; digit++) {
    int value = zn_hex(at[digit]);
    if (value < 0) {
      return -1;
    }
    unit = unit << 4 | value;
  }
  return unit;
}

static void zn_scan_string(zn_scanner *scanner) {
  if (!zn_take(scanner, '"')) {
    zn_invalid();
  }
  for (;;) {
    if (scanner->at == scanner->end) {
      zn_invalid();
    }
    unsigned char byte = (unsigned char)*scanner->at++;
    if (byte == '"') {
      return;
    }
    if (byte < 0x20) {
      zn_invalid();
    }
    if (byte != '\\') {
      continue;
    }
    char escape = zn_peek(scanner);
    scanner->at += 1;
    switch (escape) {
    case '"':
    case '\\':
    case '/':
    case 'b':
    case 'f':
    case 'n':
    case 'r':
    case 't':
      break;
    case 'u':
      if (zn_hex4(scanner->at, scanner->end) < 0) {
        zn_invalid();
      }
      scanner->at += 4;
      break;
    default:
      zn_invalid();
    }
  }
}

static void zn_scan_digits(zn_scanner *scanner) {
  const char *from = scanner->at;
  while (zn_peek(scanner) >= '0' && zn_peek(scanner) <= '9') {
    scanner->at += 1;
  }
  if (scanner->at == from) {
    zn_invalid();
  }
}

static bool zn_scan_word(zn_scanner *scanner, const char *word) {
  size_t size = 0;
  for (; word[size]; size++) {
    if (scanner->end - scanner->at <= (ptrdiff_t)size || scanner->at[size] != word[size]) {
      return false;
    }
  }
  scanner->at += size;
  return true;
}

static void zn_scan_scalar(zn_scanner *scanner) {
  if (zn_scan_word(scanner, "true") || zn_scan_word(scanner, "false") || zn_scan_word(scanner, "null")) {
    return;
  }
  zn_take(scanner, '-');
  if (!zn_take(scanner, '0')) {
    zn_scan_digits(scanner);
  }
  if (zn_take(scanner, '.')) {
    zn_scan_digits(scanner);
  }
  if (zn_take(scanner, 'e') || zn_take(scanner, 'E')) {
    if (!zn_take(scanner, '+')) {
      zn_take(scanner, '-');
    }
    zn_scan_digits(scanner);
  }
}

static void zn_scan_name(zn_scanner *scanner) {
  zn_skip_space(scanner);
  zn_scan_string(scanner);
  zn_skip_space(scanner);
  if (!zn_take(scanner, ':')) {
    zn_invalid();
  }
}

// Scans the next value, including all nested values. It keeps one bit per open container and does
// not recurse, because the module's stack is small.
static zn_value zn_scan_value(zn_scanner *scanner) {
  enum { MAX_DEPTH = 1024 };
  uint8_t objects[MAX_DEPTH / 8];
  size_t depth = 0;
  zn_skip_space(scanner);
  const char *from = scanner->at;
  for (;;) {
    zn_skip_space(scanner);
    char first = zn_peek(scanner);
    if (first == '"') {
      zn_scan_string(scanner);
    } else if (first == '{' || first == '[') {
      bool object = first == '{';
      scanner->at += 1;
      zn_skip_space(scanner);
      if (!zn_take(scanner, object ? '}' : ']')) {
        if (depth == MAX_DEPTH) {
          zn_fail("the event is nested deeper than 1024 levels");
        }
        uint8_t bit = (uint8_t)(1u << depth % 8);
        objects[depth / 8] = (uint8_t)(object ? objects[depth / 8] | bit : objects[depth / 8] & ~bit);
        depth += 1;
        if (object) {
          zn_scan_name(scanner);
        }
        continue;
      }
    } else {
      zn_scan_scalar(scanner);
    }
    // After a value, each enclosing container continues or ends.
    for (;;) {
      if (depth == 0) {
        zn_value value = {from, (size_t)(scanner->at - from)};
        return value;
      }
      bool object = objects[(depth - 1) / 8] >> (depth - 1) % 8 & 1;
      zn_skip_space(scanner);
      if (zn_take(scanner, ',')) {
        if (object) {
          zn_scan_name(scanner);
        }
        break;
      }
      if (!zn_take(scanner, object ? '}' : ']')) {
        zn_invalid();
      }
      depth -= 1;
    }
  }
}

static size_t zn_put_utf8(char *to, uint32_t code) {
  if (code < 0x80) {
    to[0] = (char)code;
    return 1;
  }
  if (code < 0x800) {
    to[0] = (char)(0xc0 | code >> 6);
    to[1] = (char)(0x80 | (code & 0x3f));
    return 2;
  }
  if (code < 0x10000) {
    to[0] = (char)(0xe0 | code >> 12);
    to[1] = (char)(0x80 | (code >> 6 & 0x3f));
    to[2] = (char)(0x80 | (code & 0x3f));
    return 3;
  }
  to[0] = (char)(0xf0 | code >> 18);
  to[1] = (char)(0x80 | (code >> 12 & 0x3f));
  to[2] = (char)(0x80 | (code >> 6 & 0x3f));
  to[3] = (char)(0x80 | (code & 0x3f));
  return 4;
}

// Decodes the content of a string. Copies only if there is an escape. An unpaired surrogate becomes
// U+FFFD.
static zn_str zn_unescape(const char *raw, size_t size) {
  zn_str text = {raw, size};
  size_t plain = 0;
  while (plain < size && raw[plain] != '\\') {
    plain += 1;
  }
  if (plain == size) {
    return text;
  }
  char *to = (char *)zn_scratch(size);
  zn_copy(to, raw, plain);
  size_t length = plain;
  const char *at = raw + plain;
  const char *end = raw + size;
  while (at < end) {
    if (*at != '\\' || at + 1 == end) {
      to[length++] = *at++;
      continue;
    }
    char escape = at[1];
    at += 2;
    switch (escape) {
    case 'b':
      to[length++] = '\b';
      break;
    case 'f':
      to[length++] = '\f';
      break;
    case 'n':
      to[length++] = '\n';
      break;
    case 'r':
      to[length++] = '\r';
      break;
    case 't':
      to[length++] = '\t';
      break;
    case 'u': {
      int32_t unit = zn_hex4(at, end);
      uint32_t code = unit < 0 ? 0xfffd : (uint32_t)unit;
      at = end - at < 4 ? end : at + 4;
      if (code >= 0xd800 && code < 0xdc00 && end - at >= 6 && at[0] == '\\' && at[1] == 'u') {
        int32_t low = zn_hex4(at + 2, end);
        if (low >= 0xdc00 && low < 0xe000) {
          code = 0x10000 + ((code - 0xd800) << 10) + ((uint32_t)low - 0xdc00);
          at += 6;
        }
      }
      if (code >= 0xd800 && code < 0xe000) {
        code = 0xfffd;
      }
      length += zn_put_utf8(to + length, code);
      break;
    }
    default:
      to[length++] = escape;
    }
  }
  text.data = to;
  text.size = length;
  return text;
}

zn_iterator zn_each(zn_value container) {
  zn_iterator iterator = {{NULL, 0}, {NULL, 0}, container, 1};
  return iterator;
}

static char zn_kind(zn_value value) { return value.size ? value.data[0] : 0; }

// Advances the iterator. The name is not unescaped.
static bool zn_step(zn_iterator *iterator) {
  zn_value container = iterator->container;
  char kind = zn_kind(container);
  if ((kind != '{' && kind != '[') || iterator->at >= container.size) {
    return false;
  }
  zn_scanner scanner = {container.data + iterator->at, container.data + container.size};
  zn_skip_space(&scanner);
  zn_take(&scanner, ',');
  zn_skip_space(&scanner);
  if (zn_peek(&scanner) == '}' || zn_peek(&scanner) == ']') {
    iterator->at = container.size;
    return false;
  }
  if (kind == '{') {
    const char *from = scanner.at + 1;
    zn_scan_string(&scanner);
    iterator->name.data = from;
    iterator->name.size = (size_t)(scanner.at - from) - 1;
    zn_skip_space(&scanner);
    zn_take(&scanner, ':');
  }
  iterator->value = zn_scan_value(&scanner);
  iterator->at = (size_t)(scanner.at - container.data);
  return true;
}

bool zn_next(zn_iterator *iterator) {
  if (!zn_step(iterator)) {
    return false;
  }
  iterator->name = zn_unescape(iterator->name.data, iterator->name.size);
  return true;
}

static char zn_lower(char letter) { return letter >= 'A' && letter <= 'Z' ? (char)(letter | 0x20) : letter; }

static bool zn_matches(zn_str text, zn_str other, bool ignoring_case) {
  if (text.size != other.size) {
    return false;
  }
  for (size_t at = 0; at < text.size; at++) {
    char left = text.data[at];
    char right = other.data[at];
    if (left != right && !(ignoring_case && zn_lower(left) == zn_lower(right))) {
      return false;
    }
  }
  return true;
}

static zn_value zn_find(zn_value object, zn_str name, bool ignoring_case) {
  zn_value found = {NULL, 0};
  if (zn_kind(object) != '{') {
    return found;
  }
  zn_iterator each = zn_each(object);
  while (zn_step(&each)) {
    zn_str key = each.name;
    // An escape is longer than the character that it encodes.
    if (key.size > name.size) {
      key = zn_unescape(key.data, key.size);
    }
    if (zn_matches(key, name, ignoring_case)) {
      found = each.value;
    }
  }
  return found;
}

zn_value zn_get(zn_value object, const char *name) { return zn_find(object, zn_from(name), false); }

bool zn_exists(zn_value value) { return value.size > 0; }

zn_str zn_as_text(zn_value value) {
  zn_str none = {"", 0};
  return zn_kind(value) == '"' ? zn_unescape(value.data + 1, value.size - 2) : none;
}

zn_str zn_text(zn_value object, const char *name) { return zn_as_text(zn_get(object, name)); }

uint64_t zn_number(zn_value object, const char *name, uint64_t otherwise) {
  zn_value value = zn_get(object, name);
  uint64_t number = 0;
  for (size_t at = 0; at < value.size; at++) {
    char digit = value.data[at];
    if (digit < '0' || digit > '9' || number > (UINT64_MAX - 9) / 10) {
      return otherwise;
    }
    number = number * 10 + (uint64_t)(digit - '0');
  }
  return value.size ? number : otherwise;
}

bool zn_flag(zn_value object, const char *name) { return zn_kind(zn_get(object, name)) == 't'; }

static zn_value zn_find_header(zn_value event, const char *in, const char *name) {
  return zn_find(zn_get(event, in), zn_from(name), true);
}

zn_str zn_header(zn_value event, const char *name) { return zn_as_text(zn_find_header(event, "headers", name)); }

bool zn_has_header(zn_value event, const char *name) { return zn_exists(zn_find_header(event, "headers", name)); }

bool zn_header_value(zn_value event, const char *name, size_t index, zn_str *value) {
  zn_value list = zn_find_header(event, "header_values", name);
  if (!zn_exists(list)) {
    *value = zn_header(event, name);
    return index == 0 && zn_has_header(event, name);
  }
  zn_iterator each = zn_each(list);
  for (size_t at = 0; zn_step(&each); at++) {
    if (at == index) {
      *value = zn_as_text(each.value);
      return true;
    }
  }
  return false;
}

static int zn_base64_digit(char digit) {
  if (digit >= 'A' && digit <= 'Z') {
    return digit - 'A';
  }
  if (digit >= 'a' && digit <= 'z') {
    return digit - 'a' + 26;
  }
  if (digit >= '0' && digit <= '9') {
    return digit - '0' + 52;
  }
  return digit == '+' ? 62 : digit == '/' ? 63 : -1;
}

zn_str zn_body(zn_value event) {
  // The payload of a WebSocket frame has another field name.
  bool frame = zn_exists(zn_get(event, "data"));
  zn_str body = zn_text(event, frame ? "data" : "body");
  if (!zn_equal(zn_text(event, frame ? "data_encoding" : "body_encoding"), "base64")) {
    return body;
  }
  char *to = (char *)zn_scratch(body.size / 4 * 3 + 3);
  size_t size = 0;
  uint32_t bits = 0;
  unsigned have = 0;
  for (size_t at = 0; at < body.size && body.data[at] != '='; at++) {
    int digit = zn_base64_digit(body.data[at]);
    if (digit < 0) {
      zn_fail("the body is invalid base64");
    }
    bits = bits << 6 | (uint32_t)digit;
    have += 6;
    if (have >= 8) {
      have -= 8;
      to[size++] = (char)(bits >> have);
    }
  }
  zn_str bytes = {to, size};
  return bytes;
}

// ---- Comparing ----------------------------------------------------------------------------------

bool zn_equal(zn_str text, const char *other) { return zn_matches(text, zn_from(other), false); }

bool zn_equal_ignoring_case(zn_str text, const char *other) { return zn_matches(text, zn_from(other), true); }

bool zn_starts_with(zn_str text, const char *prefix) {
  zn_str other = zn_from(prefix);
  if (text.size < other.size) {
    return false;
  }
  text.size = other.size;
  return zn_matches(text, other, false);
}

static bool zn_search(zn_str text, zn_str part, bool ignoring_case) {
  for (size_t at = 0; at + part.size <= text.size; at++) {
    zn_str window = {text.data + at, part.size};
    if (zn_matches(window, part, ignoring_case)) {
      return true;
    }
  }
  return false;
}

bool zn_contains(zn_str text, const char *part) { return zn_search(text, zn_from(part), false); }

bool zn_contains_ignoring_case(zn_str text, const char *part) { return zn_search(text, zn_from(part), true); }

// ---- Answering ----------------------------------------------------------------------------------

typedef struct {
  char *data;
  size_t size;
  size_t room;
} zn_buffer;

// A name and a value in one of the objects of an answer.
typedef struct zn_pair {
  struct zn_pair *next;
  int part;
  zn_str name;
  zn_str value;
} zn_pair;

// The objects and lists of an answer. Each is built separately; zn_finish joins them.
enum {
  ZN_FIELDS,
  ZN_PARAMS,
  ZN_SET_REQUEST,
  ZN_APPEND_REQUEST,
  ZN_REMOVE_REQUEST,
  ZN_SET_RESPONSE,
  ZN_APPEND_RESPONSE,
  ZN_REMOVE_RESPONSE,
  ZN_TAGS,
  ZN_RULES,
  ZN_REASONS,
  ZN_ROUTING,
  ZN_PARTS
};

struct zn_answer {
  const char *decision;
  unsigned status;
  zn_str body;
  zn_str challenge;
  zn_buffer parts[ZN_PARTS];
  zn_pair *first;
  zn_pair *last;
};

static void zn_put(zn_buffer *buffer, const char *data, size_t size) {
  if (buffer->room - buffer->size < size) {
    size_t room = buffer->room * 2 + size + 64;
    char *bigger = (char *)zn_scratch(room);
    zn_copy(bigger, buffer->data, buffer->size);
    buffer->data = bigger;
    buffer->room = room;
  }
  zn_copy(buffer->data + buffer->size, data, size);
  buffer->size += size;
}

static void zn_put_text(zn_buffer *buffer, const char *text) { zn_put(buffer, text, zn_size(text)); }

static void zn_put_string(zn_buffer *buffer, zn_str text) {
  zn_put(buffer, "\"", 1);
  size_t from = 0;
  for (size_t at = 0; at < text.size; at++) {
    unsigned char byte = (unsigned char)text.data[at];
    if (byte >= 0x20 && byte != '"' && byte != '\\') {
      continue;
    }
    zn_put(buffer, text.data + from, at - from);
    from = at + 1;
    const char *hex = "0123456789abcdef";
    char escape[6] = {'\\', 'u', '0', '0', hex[byte >> 4], hex[byte & 15]};
    if (byte == '"' || byte == '\\') {
      escape[1] = (char)byte;
    }
    zn_put(buffer, escape, escape[1] == 'u' ? 6 : 2);
  }
  zn_put(buffer, text.data + from, text.size - from);
  zn_put(buffer, "\"", 1);
}

static void zn_put_number(zn_buffer *buffer, uint32_t value) {
  char digits[10];
  size_t from = sizeof digits;
  do {
    digits[--from] = (char)('0' + value % 10);
    value /= 10;
  } while (value);
  zn_put(buffer, digits + from, sizeof digits - from);
}

static void zn_put_comma(zn_buffer *buffer) {
  if (buffer->size) {
    zn_put(buffer, ",", 1);
  }
}

static zn_buffer *zn_put_name(zn_answer *answer, int part, const char *name) {
  zn_buffer *buffer = &answer->parts[part];
  zn_put_comma(buffer);
  zn_put_string(buffer, zn_from(name));
  zn_put(buffer, ":", 1);
  return buffer;
}

static void zn_put_item(zn_answer *answer, int part, const char *text) {
  zn_put_comma(&answer->parts[part]);
  zn_put_string(&answer->parts[part], zn_from(text));
}

// Copies text into the answer, because it may be on the hook's stack.
static zn_str zn_keep(zn_str text) {
  char *copy = (char *)zn_scratch(text.size);
  zn_copy(copy, text.data, text.size);
  zn_str kept = {copy, text.size};
  return kept;
}

// Names of headers and params ignore case.
static zn_pair *zn_find_pair(zn_pair *pair, int part, zn_str name) {
  while (pair && (pair->part != part || !zn_matches(pair->name, name, part != ZN_ROUTING))) {
    pair = pair->next;
  }
  return pair;
}

static void zn_append_pair(zn_answer *answer, int part, const char *name, zn_str value) {
  size_t size = zn_size(name);
  zn_pair *pair = (zn_pair *)zn_scratch(sizeof(zn_pair) + size + value.size);
  char *copy = (char *)(pair + 1);
  zn_copy(copy, name, size);
  zn_copy(copy + size, value.data, value.size);
  pair->next = NULL;
  pair->part = part;
  pair->name.data = copy;
  pair->name.size = size;
  pair->value.data = copy + size;
  pair->value.size = value.size;
  *(answer->last ? &answer->last->next : &answer->first) = pair;
  answer->last = pair;
}

// Removes earlier pairs of the name, because a JSON object must not repeat a name.
static void zn_remove_pairs(zn_answer *answer, int part, const char *name) {
  zn_pair *before = NULL;
  for (zn_pair *pair = answer->first; pair; pair = pair->next) {
    if (zn_find_pair(pair, part, zn_from(name)) != pair) {
      before = pair;
      continue;
    }
    *(before ? &before->next : &answer->first) = pair->next;
    if (!pair->next) {
      answer->last = before;
    }
  }
}

static void zn_set_pair(zn_answer *answer, int part, const char *name, zn_str value) {
  zn_remove_pairs(answer, part, name);
  zn_append_pair(answer, part, name, value);
}

// Writes the members of an object. Multiple values of a name become a list.
static void zn_put_pairs(zn_answer *answer, int part) {
  zn_buffer *buffer = &answer->parts[part];
  for (zn_pair *pair = answer->first; pair; pair = pair->next) {
    if (pair->part != part || zn_find_pair(answer->first, part, pair->name) != pair) {
      continue;
    }
    zn_put_comma(buffer);
    zn_put_string(buffer, pair->name);
    zn_put(buffer, ":", 1);
    zn_pair *other = zn_find_pair(pair->next, part, pair->name);
    if (!other) {
      zn_put_string(buffer, pair->value);
      continue;
    }
    zn_put(buffer, "[", 1);
    zn_put_string(buffer, pair->value);
    for (; other; other = zn_find_pair(other->next, part, pair->name)) {
      zn_put(buffer, ",", 1);
      zn_put_string(buffer, other->value);
    }
    zn_put(buffer, "]", 1);
  }
}

void zn_allow(zn_answer *answer) { answer->decision = "allow"; }

void zn_block_str(zn_answer *answer, unsigned status, zn_str body) {
  answer->decision = "block";
  answer->status = status;
  answer->body = zn_keep(body);
}

void zn_block(zn_answer *answer, unsigned status, const char *body) { zn_block_str(answer, status, zn_from(body)); }

void zn_redirect_str(zn_answer *answer, unsigned status, zn_str url) {
  answer->decision = "redirect";
  answer->status = status;
  answer->body = zn_keep(url);
}

void zn_redirect(zn_answer *answer, unsigned status, const char *url) { zn_redirect_str(answer, status, zn_from(url)); }

void zn_challenge(zn_answer *answer, const char *type) {
  answer->decision = "challenge";
  answer->challenge = zn_keep(zn_from(type));
}

void zn_challenge_param_str(zn_answer *answer, const char *name, zn_str value) {
  zn_set_pair(answer, ZN_PARAMS, name, value);
}

void zn_challenge_param(zn_answer *answer, const char *name, const char *value) {
  zn_challenge_param_str(answer, name, zn_from(value));
}

void zn_set_request_header_str(zn_answer *answer, const char *name, zn_str value) {
  zn_set_pair(answer, ZN_SET_REQUEST, name, value);
}

void zn_set_request_header(zn_answer *answer, const char *name, const char *value) {
  zn_set_request_header_str(answer, name, zn_from(value));
}

void zn_append_request_header_str(zn_answer *answer, const char *name, zn_str value) {
  zn_append_pair(answer, ZN_APPEND_REQUEST, name, value);
}

void zn_append_request_header(zn_answer *answer, const char *name, const char *value) {
  zn_append_request_header_str(answer, name, zn_from(value));
}

void zn_remove_request_header(zn_answer *answer, const char *name) { zn_put_item(answer, ZN_REMOVE_REQUEST, name); }

void zn_set_response_header_str(zn_answer *answer, const char *name, zn_str value) {
  zn_set_pair(answer, ZN_SET_RESPONSE, name, value);
}

void zn_set_response_header(zn_answer *answer, const char *name, const char *value) {
  zn_set_response_header_str(answer, name, zn_from(value));
}

void zn_set_response_header_list(zn_answer *answer, const char *name, const zn_str *values, size_t count) {
  zn_remove_pairs(answer, ZN_SET_RESPONSE, name);
  for (size_t at = 0; at < count; at++) {
    zn_append_pair(answer, ZN_SET_RESPONSE, name, values[at]);
  }
}

void zn_append_response_header_str(zn_answer *answer, const char *name, zn_str value) {
  zn_append_pair(answer, ZN_APPEND_RESPONSE, name, value);
}

void zn_append_response_header(zn_answer *answer, const char *name, const char *value) {
  zn_append_response_header_str(answer, name, zn_from(value));
}

void zn_remove_response_header(zn_answer *answer, const char *name) { zn_put_item(answer, ZN_REMOVE_RESPONSE, name); }

void zn_tag(zn_answer *answer, const char *tag) { zn_put_item(answer, ZN_TAGS, tag); }

void zn_rule_id(zn_answer *answer, const char *rule_id) { zn_put_item(answer, ZN_RULES, rule_id); }

void zn_reason_code(zn_answer *answer, const char *reason_code) { zn_put_item(answer, ZN_REASONS, reason_code); }

void zn_confidence(zn_answer *answer, double from_0_to_1) {
  zn_buffer *buffer = zn_put_name(answer, ZN_FIELDS, "confidence");
  // The negation turns NaN into 0.
  if (!(from_0_to_1 > 0)) {
    from_0_to_1 = 0;
  }
  if (from_0_to_1 > 1) {
    from_0_to_1 = 1;
  }
  uint32_t millionths = (uint32_t)(from_0_to_1 * 1e6 + 0.5);
  zn_put_number(buffer, millionths / 1000000);
  char digits[7] = {'.'};
  for (size_t digit = 6; digit > 0; digit--) {
    digits[digit] = (char)('0' + millionths % 10);
    millionths /= 10;
  }
  zn_put(buffer, digits, sizeof digits);
}

void zn_routing(zn_answer *answer, const char *name, const char *value) {
  zn_set_pair(answer, ZN_ROUTING, name, zn_from(value));
}

void zn_json_field(zn_answer *answer, const char *name, const char *json) {
  zn_put_text(zn_put_name(answer, ZN_FIELDS, name), json);
}

void zn_needs_more(zn_answer *answer) { zn_json_field(answer, "needs_more", "true"); }

// Encodes the body as base64, because it need not be UTF-8.
static void zn_replace_body(zn_answer *answer, const char *name, zn_str body) {
  static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  zn_buffer *buffer = zn_put_name(answer, ZN_FIELDS, name);
  zn_put_text(buffer, "{\"action\":\"replace\",\"data_base64\":\"");
  for (size_t at = 0; at < body.size; at += 3) {
    size_t have = body.size - at;
    uint32_t bits = (uint32_t)(unsigned char)body.data[at] << 16;
    bits |= have > 1 ? (uint32_t)(unsigned char)body.data[at + 1] << 8 : 0;
    bits |= have > 2 ? (uint32_t)(unsigned char)body.data[at + 2] : 0;
    char digits[4] = {alphabet[bits >> 18], alphabet[bits >> 12 & 63], have > 1 ? alphabet[bits >> 6 & 63] : '=',
                      have > 2 ? alphabet[bits & 63] : '='};
    zn_put(buffer, digits, sizeof digits);
  }
  zn_put_text(buffer, "\"}");
}

void zn_replace_request_body(zn_answer *answer, zn_str body) { zn_replace_body(answer, "request_body_mutation", body); }

void zn_replace_response_body(zn_answer *answer, zn_str body) {
  zn_replace_body(answer, "response_body_mutation", body);
}

void zn_drop_request_body(zn_answer *answer) {
  zn_json_field(answer, "request_body_mutation", "{\"action\":\"drop\"}");
}

void zn_drop_response_body(zn_answer *answer) {
  zn_json_field(answer, "response_body_mutation", "{\"action\":\"drop\"}");
}

void zn_drop_frame(zn_answer *answer) { zn_json_field(answer, "websocket_decision", "\"drop\""); }

void zn_close_websocket(zn_answer *answer, unsigned code, const char *reason) {
  zn_buffer *buffer = zn_put_name(answer, ZN_FIELDS, "websocket_decision");
  zn_put_text(buffer, "{\"close\":{\"code\":");
  zn_put_number(buffer, code);
  zn_put_text(buffer, ",\"reason\":");
  zn_put_string(buffer, zn_from(reason));
  zn_put_text(buffer, "}}");
}

void zn_reject_configuration(zn_answer *answer, const char *reason) {
  zn_put_string(zn_put_name(answer, ZN_FIELDS, "error"), zn_from(reason));
}

// Joins the parts of an answer. The agent frees the memory.
static uint64_t zn_finish(zn_answer *answer) {
  static const struct {
    const char *name;
    bool object;
  } names[ZN_PARTS] = {
      {NULL, false},
      {"challenge_params", true},
      {"add_request_headers", true},
      {"append_request_headers", true},
      {"remove_request_headers", false},
      {"add_response_headers", true},
      {"append_response_headers", true},
      {"remove_response_headers", false},
      {"tags", false},
      {"rule_ids", false},
      {"reason_codes", false},
      {"routing_metadata", true},
  };
  if (answer->decision) {
    zn_put_string(zn_put_name(answer, ZN_FIELDS, "decision"), zn_from(answer->decision));
  }
  if (answer->status) {
    zn_put_number(zn_put_name(answer, ZN_FIELDS, "status"), answer->status);
  }
  if (answer->body.data) {
    zn_put_string(zn_put_name(answer, ZN_FIELDS, "body"), answer->body);
  }
  if (answer->challenge.data) {
    zn_put_string(zn_put_name(answer, ZN_FIELDS, "challenge_type"), answer->challenge);
  }
  for (int part = ZN_PARAMS; part < ZN_PARTS; part++) {
    if (names[part].object) {
      zn_put_pairs(answer, part);
    }
    if (answer->parts[part].size) {
      zn_buffer *buffer = zn_put_name(answer, ZN_FIELDS, names[part].name);
      zn_put(buffer, names[part].object ? "{" : "[", 1);
      zn_put(buffer, answer->parts[part].data, answer->parts[part].size);
      zn_put(buffer, names[part].object ? "}" : "]", 1);
    }
  }
  zn_buffer *fields = &answer->parts[ZN_FIELDS];
  if (!fields->size) {
    return 0;
  }
  size_t size = fields->size + 2;
  char *json = (char *)zn_export_alloc(size);
  if (!json) {
    zn_fail("out of memory");
  }
  json[0] = '{';
  zn_copy(json + 1, fields->data, fields->size);
  json[size - 1] = '}';
  return (uint64_t)(uintptr_t)json << 32 | size;
}

uint64_t zn_call(zn_hook *hook, char *json, size_t size) {
  zn_scanner scanner = {json, json + size};
  zn_value event = zn_scan_value(&scanner);
  zn_skip_space(&scanner);
  if (scanner.at != scanner.end || zn_kind(event) != '{') {
    zn_invalid();
  }
  zn_answer answer;
  __builtin_memset(&answer, 0, sizeof answer);
  hook(event, &answer);
  uint64_t result = zn_finish(&answer);
  zn_free_scratch();
  return result;
}

#ifdef __cplusplus
}
#endif

#endif // ZENTINEL_IMPLEMENTATION
