/** The standard alphabet of RFC 4648, with padding. */

const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

export function decode(text: string): Uint8Array {
  const bytes = new Uint8Array((text.length / 4) * 3 + 3);
  let size = 0;
  let bits: u32 = 0;
  let have = 0;
  for (let at = 0; at < text.length && text.charCodeAt(at) != 0x3d; at++) {
    const digit = value(text.charCodeAt(at));
    if (digit < 0) throw new Error("the body is not base64");
    bits = (bits << 6) | digit;
    have += 6;
    if (have >= 8) {
      have -= 8;
      bytes[size++] = <u8>(bits >> have);
    }
  }
  return bytes.subarray(0, size);
}

export function encode(bytes: Uint8Array): string {
  const parts: string[] = [];
  for (let at = 0; at < bytes.length; at += 3) {
    const have = bytes.length - at;
    let bits = (<u32>bytes[at]) << 16;
    if (have > 1) bits |= (<u32>bytes[at + 1]) << 8;
    if (have > 2) bits |= <u32>bytes[at + 2];
    parts.push(
      ALPHABET.charAt(bits >> 18) +
        ALPHABET.charAt((bits >> 12) & 63) +
        (have > 1 ? ALPHABET.charAt((bits >> 6) & 63) : "=") +
        (have > 2 ? ALPHABET.charAt(bits & 63) : "="),
    );
  }
  return parts.join("");
}

function value(code: i32): i32 {
  if (code >= 0x41 && code <= 0x5a) return code - 0x41;
  if (code >= 0x61 && code <= 0x7a) return code - 0x61 + 26;
  if (code >= 0x30 && code <= 0x39) return code - 0x30 + 52;
  return code == 0x2b ? 62 : code == 0x2f ? 63 : -1;
}
