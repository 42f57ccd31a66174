/** Base64 with the standard alphabet of RFC 4648 and padding. */

const PADDING: u8 = 0x3d;

/** The value of bytes that are not digits. */
const NONE: u8 = 0xff;

/** The value of each byte. */
const VALUES = values();

/** Decodes the digits from `start` to `end`. */
export function decode(start: usize, end: usize): Uint8Array {
  for (let padding = 0; padding < 2 && end > start && load<u8>(end - 1) == PADDING; padding++) end--;
  const bytes = new Uint8Array(<i32>(((end - start) * 3) >> 2));
  let to = bytes.dataStart;
  let from = start;
  // NONE sets a bit above the six of a digit.
  let wrong: u32 = 0;
  for (; from + 4 <= end; from += 4, to += 3) {
    const a = value(from);
    const b = value(from + 1);
    const c = value(from + 2);
    const d = value(from + 3);
    wrong |= a | b | c | d;
    store<u8>(to, (a << 2) | (b >> 4));
    store<u8>(to, (b << 4) | (c >> 2), 1);
    store<u8>(to, (c << 6) | d, 2);
  }
  const left = end - from;
  if (left >= 2) {
    const b = value(from + 1);
    wrong |= value(from) | b;
    store<u8>(to, (value(from) << 2) | (b >> 4));
    if (left == 3) {
      const c = value(from + 2);
      wrong |= c;
      store<u8>(to, (b << 4) | (c >> 2), 1);
    }
  }
  if (wrong > 63 || left == 1) throw new Error("the body is invalid base64");
  return bytes;
}

function value(at: usize): u32 {
  return load<u8>(changetype<usize>(VALUES) + load<u8>(at));
}

function values(): StaticArray<u8> {
  const values = new StaticArray<u8>(256);
  const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  values.fill(NONE);
  for (let at = 0; at < alphabet.length; at++) values[alphabet.charCodeAt(at)] = <u8>at;
  return values;
}
