//! Numbers as people read them.

/// 1234567 -> "1,234,567".
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// 75.2 -> "1 min 15 s".
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// 157286400 -> "150 MiB".
pub fn bytes(number: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut amount = number as f64;
    let mut unit = "B";
    for larger in units {
        if amount < 1024.0 {
            break;
        }
        amount /= 1024.0;
        unit = larger;
    }
    // Two or three digits, and none behind the point where there is nothing.
    let decimals = usize::from(amount < 100.0 && amount.fract() > 0.0);
    format!("{amount:.decimals$} {unit}")
}

/// 219100000 -> "219.1 M", to stand before a unit.
pub fn scaled(number: f64) -> String {
    let units = [" ", " k", " M", " G", " T", " P"];
    let power = (number.max(1.0).log10() / 3.0).floor() as usize;
    let power = power.min(units.len() - 1);
    format!("{:.1}{}", number / 1000f64.powi(power as i32), units[power])
}

#[cfg(test)]
mod tests {
    use super::{bytes, duration, grouped};

    #[test]
    fn every_three_digits() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (124_439_808, "124,439,808"),
        ];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn in_the_units_of_people() {
        for (seconds, text) in [(7.25, "7.2 s"), (75.2, "1 min 15 s"), (7260.0, "2 h 1 min")] {
            assert_eq!(duration(seconds), text);
        }
        for (number, text) in [
            (0, "0 B"),
            (1024, "1 KiB"),
            (157_286_400, "150 MiB"),
            (1_610_612_736, "1.5 GiB"),
            (99 << 20, "99 MiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }
}
