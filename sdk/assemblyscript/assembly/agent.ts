/** Imports from the agent. */

@external("zentinel", "log")
declare function zentinelLog(level: i32, message: usize, length: usize): void;

/** The level of a log line. */
export enum Level {
  Trace,
  Debug,
  Info,
  Warn,
  Error,
}

/** Writes a line to the agent's log. */
export function log(level: Level, message: string): void {
  const bytes = String.UTF8.encode(message, false, String.UTF8.ErrorMode.REPLACE);
  zentinelLog(level, changetype<usize>(bytes), bytes.byteLength);
}
