// Calls a module's hooks directly, without the agent, so cases may contain unusual JSON that the
// agent never writes.
//
//     node examples/cases/direct.mjs security|bot-protection|tour MODULE [page]
//
// With `page`, cases that only the SDKs must pass are skipped.

import { readFile } from "node:fs/promises";
import { isDeepStrictEqual } from "node:util";
import { WASI } from "node:wasi";

const [policy, file, page] = process.argv.slice(2);
const { cases } = JSON.parse(await readFile(new URL(`${policy}.json`, import.meta.url), "utf8"));
const module = await WebAssembly.compile(await readFile(file));

const wasi = new WASI({ version: "preview1" });
let memory;
const text = (start, length) =>
  new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(memory.buffer, start, length));
const imports = {
  ...wasi.getImportObject(),
  zentinel: { log: (level, start, length) => console.error(`log ${level}: ${text(start, length)}`) },
  env: {
    abort: () => {
      throw new Error("abort");
    },
    seed: () => Math.random(),
    "Date.now": () => Date.now(),
    "console.debug": () => {},
  },
};
const { exports } = await WebAssembly.instantiate(module, imports);
memory = exports.memory;
if (exports._initialize) wasi.initialize({ exports });

function call(hook, event) {
  const bytes = new TextEncoder().encode(event);
  const input = exports.alloc(bytes.length) >>> 0;
  new Uint8Array(memory.buffer).set(bytes, input);
  const result = BigInt.asUintN(64, exports[hook](input, bytes.length));
  exports.dealloc(input, bytes.length);
  const [start, length] = [Number(result >> 32n), Number(result & 0xffffffffn)];
  if (length === 0) return {};
  const answer = text(start, length);
  exports.dealloc(start, length);
  return JSON.parse(answer);
}

/** Converts a body replacement to base64, because SDKs may write text as `data` or as base64. */
function inBase64(value) {
  if (typeof value?.data !== "string") return value;
  const { data, ...others } = value;
  return { ...others, data_base64: Buffer.from(data).toString("base64") };
}

/** Returns the text of a value of a case, joining its pieces. */
function spell(value) {
  if (typeof value === "string") return value;
  return value.join.map((piece) => (typeof piece === "string" ? piece : piece.repeat.repeat(piece.times))).join("");
}

/** Returns the event as the agent would write it. */
function event({ method = "GET", uri = "/", client_ip = "192.0.2.7", headers, more_headers = 0 }) {
  const joined = {};
  for (let n = 0; n < more_headers; n++) joined[`X-Header-${n}`] = `value ${n}`;
  const values = {};
  for (const [name, value] of Object.entries(headers)) {
    const canonical = name.toLowerCase().replace(/(^|-)[a-z]/g, (letter) => letter.toUpperCase());
    if (Array.isArray(value)) values[canonical] = value;
    joined[canonical] = Array.isArray(value) ? value.join(canonical === "Cookie" ? "; " : ", ") : spell(value);
  }
  return JSON.stringify({
    method,
    uri: spell(uri),
    client_ip,
    correlation_id: "c",
    headers: joined,
    header_values: values,
  });
}

let passed = 0;
let failed = 0;
for (const { name, hook, request, raw, expect, sdk } of cases) {
  if (sdk && page) continue;
  const answer = call(hook, raw ?? event(request));
  const found = {};
  for (const field of Object.keys(expect)) {
    found[field] =
      inBase64(answer[field]) ?? { decision: "allow", challenge_params: {}, rejected: typeof answer.error === "string" }[field];
  }
  if (isDeepStrictEqual(found, expect)) {
    passed++;
  } else {
    failed++;
    console.log(
      `${policy}: ${name}: expected ${JSON.stringify(expect)}, the module answered ${JSON.stringify(answer)}`,
    );
  }
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 ? 0 : 1;
