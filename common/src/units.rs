//! Amounts as people write them: `16GiB`, `500m`, `1h30m`. Strict: what is not understood is refused with the form
//! that would be, never rounded or guessed. Integers all the way; there is no float in any amount.

use std::time::Duration;

/// A text that is not an amount of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct InvalidAmount {
    /// What was given, cut to a readable length.
    pub text: String,
    /// The form it should have.
    pub expected: &'static str,
}

fn invalid(text: &str, expected: &'static str) -> InvalidAmount {
    InvalidAmount {
        text: text.chars().take(64).collect(),
        expected,
    }
}

const BYTES_FORM: &str =
    "an amount of memory; write a whole number with a unit, such as 512MiB, 16GiB or 64GB";
const CPU_FORM: &str = "an amount of CPUs; write a number with at most three decimals or milli-CPUs, such as 4, 0.5 or 500m";
const DURATION_FORM: &str =
    "a duration; write whole numbers with units d, h, m, s or ms, such as 90s, 2h or 1h30m";
// What a number that is too long to be counted is told. The limits of `crate::limits` lie far below.
const BYTES_RANGE: &str = "a possible amount of memory; no node has more than 64 TiB";
const CPU_RANGE: &str = "a possible amount of CPUs; no node has more than 4096";
const DURATION_RANGE: &str = "a possible duration; the longest that anything takes is 366d";

/// Splits ASCII digits off the front.
fn split_digits(text: &str) -> (&str, &str) {
    let end = text
        .bytes()
        .position(|b| !b.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

/// Reads an amount of memory in bytes: a whole number with `B`, `K`/`KiB`, `KB`, `M`/`MiB`, `MB`, `G`/`GiB`, `GB`,
/// `T`/`TiB` or `TB`; a bare number is bytes. The single letters are powers of 1024, as in Slurm and Kubernetes' `Ki`.
pub fn parse_bytes(text: &str) -> Result<u64, InvalidAmount> {
    let (digits, unit) = split_digits(text);
    let scale: u64 = match unit {
        "" | "B" => 1,
        "K" | "KiB" | "Ki" => 1 << 10,
        "M" | "MiB" | "Mi" => 1 << 20,
        "G" | "GiB" | "Gi" => 1 << 30,
        "T" | "TiB" | "Ti" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(invalid(text, BYTES_FORM)),
    };
    if digits.is_empty() {
        return Err(invalid(text, BYTES_FORM));
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(scale))
        .ok_or_else(|| invalid(text, BYTES_RANGE))
}

/// Reads an amount of CPUs in milli-CPUs: `4`, `0.5` or `500m`.
pub fn parse_cpus(text: &str) -> Result<u64, InvalidAmount> {
    let refuse = || invalid(text, CPU_FORM);
    let too_much = || invalid(text, CPU_RANGE);
    let (digits, rest) = split_digits(text);
    if digits.is_empty() {
        return Err(refuse());
    }
    let whole = || digits.parse::<u64>().map_err(|_| too_much());
    match rest {
        "" => whole()?.checked_mul(1000).ok_or_else(too_much),
        "m" => whole(),
        _ => {
            let (decimals, tail) = split_digits(rest.strip_prefix('.').ok_or_else(refuse)?);
            if !tail.is_empty() || !(1..=3).contains(&decimals.len()) {
                return Err(refuse());
            }
            let fraction: u64 = format!("{decimals:0<3}").parse().map_err(|_| refuse())?;
            whole()?
                .checked_mul(1000)
                .and_then(|milli| milli.checked_add(fraction))
                .ok_or_else(too_much)
        }
    }
}

/// Reads a duration: one or more whole numbers with the units `d`, `h`, `m`, `s`, `ms`, largest first (`1h30m`); a bare
/// number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidAmount> {
    const UNITS: [(&str, u64); 5] = [
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
        ("ms", 1),
    ];
    let refuse = || invalid(text, DURATION_FORM);
    let mut total: u64 = 0;
    let mut rest = text;
    let mut next_unit = 0;
    while !rest.is_empty() || next_unit == 0 {
        let (digits, tail) = split_digits(rest);
        if digits.is_empty() {
            return Err(refuse());
        }
        let end = tail
            .bytes()
            .position(|b| b.is_ascii_digit())
            .unwrap_or(tail.len());
        let unit = match &tail[..end] {
            "" if next_unit == 0 => "s",
            unit => unit,
        };
        let place = UNITS[next_unit..]
            .iter()
            .position(|(name, _)| *name == unit)
            .ok_or_else(refuse)?
            + next_unit;
        total = digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(UNITS[place].1))
            .and_then(|part| total.checked_add(part))
            .ok_or_else(|| invalid(text, DURATION_RANGE))?;
        next_unit = place + 1;
        rest = &tail[end..];
    }
    Ok(Duration::from_millis(total))
}

/// Writes bytes for people with a binary unit and at most one decimal: `1.5 GiB`.
#[must_use]
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [
        ("TiB", 1 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    for (unit, scale) in UNITS {
        if bytes >= scale {
            let tenths = (u128::from(bytes) * 10 / u128::from(scale)) as u64;
            return match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                tenth => format!("{}.{tenth} {unit}", tenths / 10),
            };
        }
    }
    format!("{bytes} B")
}

/// Writes milli-CPUs for people: `4`, `0.5`.
#[must_use]
pub fn format_cpus(milli: u64) -> String {
    match milli % 1000 {
        0 => (milli / 1000).to_string(),
        fraction => format!("{}.{fraction:03}", milli / 1000)
            .trim_end_matches('0')
            .to_owned(),
    }
}

/// Writes a duration for people with its two largest units: `2h 5m`, `42s`, `0.3s`, `40ms`.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 if duration.subsec_millis() >= 100 => format!("0.{}s", duration.subsec_millis() / 100),
        0 if duration.subsec_millis() > 0 => format!("{}ms", duration.subsec_millis()),
        0..60 => format!("{seconds}s"),
        60..3600 => two(seconds, 60, "m", 1, "s"),
        3600..86_400 => two(seconds, 3600, "h", 60, "m"),
        _ => two(seconds, 86_400, "d", 3600, "h"),
    }
}

fn two(seconds: u64, large: u64, large_unit: &str, small: u64, small_unit: &str) -> String {
    match seconds % large / small {
        0 => format!("{}{large_unit}", seconds / large),
        rest => format!("{}{large_unit} {rest}{small_unit}", seconds / large),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits;

    #[test]
    fn amounts_of_memory() {
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("64GB"), Ok(64_000_000_000));
        assert_eq!(parse_bytes("7"), Ok(7));
        for bad in [
            "",
            "GiB",
            "-1",
            "1.5GiB",
            "1 GiB",
            "1e3",
            "１GiB",
            "99999999999TiB",
            "NaN",
            "inf",
        ] {
            assert!(parse_bytes(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn amounts_of_cpus() {
        assert_eq!(parse_cpus("4"), Ok(4000));
        assert_eq!(parse_cpus("0.5"), Ok(500));
        assert_eq!(parse_cpus("500m"), Ok(500));
        assert_eq!(parse_cpus("1.125"), Ok(1125));
        for bad in [
            "",
            ".5",
            "-0",
            "1e3",
            "NaN",
            "inf",
            "1.",
            "1.2345",
            "１",
            "18446744073709551615",
        ] {
            assert!(parse_cpus(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in [
            "",
            "h",
            "1m1h",
            "1h1",
            "-1s",
            "1.5h",
            "1h 30m",
            "1w",
            "999999999999999999d",
            "1s1s",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_too_long_to_count_is_told_the_limit() {
        let bytes = format_bytes(limits::MAX_MEMORY_PER_NODE);
        for text in ["99999999999TiB", "99999999999999999999999"] {
            let told = parse_bytes(text).unwrap_err().to_string();
            assert!(told.ends_with(&format!("more than {bytes}")), "{told}");
        }
        let cpus = format_cpus(limits::MAX_CPU_MILLI_PER_NODE);
        for text in ["18446744073709551615", "99999999999999999999.5"] {
            let told = parse_cpus(text).unwrap_err().to_string();
            assert!(told.ends_with(&format!("more than {cpus}")), "{told}");
        }
        let longest = format_duration(limits::MAX_TIME_LIMIT);
        for text in ["999999999999999999d", "100000000000000000000s"] {
            let told = parse_duration(text).unwrap_err().to_string();
            assert!(told.ends_with(&format!("takes is {longest}")), "{told}");
        }
        for text in ["", "GiB", "-1", "1e9"] {
            let told = parse_bytes(text).unwrap_err();
            assert_eq!(told.expected, BYTES_FORM, "{text}");
        }
    }

    #[test]
    fn people_read_rounded_units() {
        assert_eq!(format_bytes(1536 << 20), "1.5 GiB");
        assert_eq!(format_bytes(u64::MAX), "16777215.9 TiB");
        assert_eq!(format_cpus(500), "0.5");
        assert_eq!(format_duration(Duration::from_secs(7500)), "2h 5m");
        assert_eq!(format_duration(Duration::from_millis(340)), "0.3s");
        assert_eq!(format_duration(Duration::from_millis(99)), "99ms");
    }

    proptest! {
        #[test]
        fn cpus_read_what_they_write(milli in 0..u64::from(u32::MAX)) {
            prop_assert_eq!(parse_cpus(&format_cpus(milli)), Ok(milli));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,12}") {
            let _ = (parse_bytes(&text), parse_cpus(&text), parse_duration(&text));
        }
    }
}
