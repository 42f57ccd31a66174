//! Timestamps as RFC 3339 text.

/// Formats milliseconds since 1970. Returns `None` for 0, which means no timestamp, and beyond the
/// year 9999.
pub(super) fn rfc3339(timestamp_ms: u64) -> Option<String> {
    /// The first millisecond of the year 10000.
    const END: u64 = 253_402_300_800_000;

    if timestamp_ms == 0 || timestamp_ms >= END {
        return None;
    }
    let (seconds, milliseconds) = (timestamp_ms / 1000, timestamp_ms % 1000);
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut text = String::with_capacity(24);
    let parts =
        [(year, 4, '-'), (month, 2, '-'), (day, 2, 'T'), (hour, 2, ':'), (minute, 2, ':'), (second, 2, '.'), (milliseconds, 3, 'Z')];
    for (number, digits, after) in parts {
        text.extend((0..digits).rev().map(|place| char::from(b'0' + (number / 10_u64.pow(place) % 10) as u8)));
        text.push(after);
    }
    Some(text)
}

/// Year, month and day of a day since 1970. Counts years from March, so the leap day is the last
/// day of a year.
const fn date(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097; // days of 400 years
    let days = days + 719_468; // since 1 March of the year 0
    let day_of_era = days % ERA;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / (ERA - 1)) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // 0 is March
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = days / ERA * 400 + year_of_era;
    (if month <= 2 { year + 1 } else { year }, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_dates_of_leap_years_and_centuries() {
        assert_eq!(rfc3339(0), None);
        assert_eq!(rfc3339(1).as_deref(), Some("1970-01-01T00:00:00.001Z"));
        assert_eq!(rfc3339(951_782_400_000).as_deref(), Some("2000-02-29T00:00:00.000Z"));
        assert_eq!(rfc3339(1_767_323_045_678).as_deref(), Some("2026-01-02T03:04:05.678Z"));
        assert_eq!(rfc3339(4_107_542_399_999).as_deref(), Some("2100-02-28T23:59:59.999Z"));
        assert_eq!(rfc3339(4_107_542_400_000).as_deref(), Some("2100-03-01T00:00:00.000Z"));
        assert_eq!(rfc3339(253_402_300_799_999).as_deref(), Some("9999-12-31T23:59:59.999Z"));
        assert_eq!(rfc3339(u64::MAX), None);
    }
}
