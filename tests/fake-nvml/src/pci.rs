//! PCI addresses in the three spellings that NVML and Linux use. Pure.

use std::fmt;

/// A PCI address; the function is always 0, as it is for GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pci {
    pub(crate) domain: u32,
    pub(crate) bus: u32,
    pub(crate) device: u32,
}

impl Pci {
    /// Reads `00000000:18:00.0`, `0000:18:00.0` or `18:00.0`.
    pub(crate) fn parse(text: &str) -> Option<Pci> {
        let hex = |digits: &str, most: u32| {
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
            let value = u32::from_str_radix(digits, 16).ok().filter(|_| plain)?;
            (value <= most).then_some(value)
        };
        let (address, function) = text.rsplit_once('.')?;
        if function != "0" {
            return None;
        }
        let mut parts = address.rsplit(':');
        let device = hex(parts.next()?, 0x1f)?;
        let bus = hex(parts.next()?, 0xff)?;
        let domain = parts
            .next()
            .map_or(Some(0), |digits| hex(digits, u32::MAX))?;
        parts.next().is_none().then_some(Pci {
            domain,
            bus,
            device,
        })
    }

    /// The address of the `index`th GPU of an imagined machine.
    pub(crate) const fn of_index(index: u32) -> Pci {
        // Sixteen to a domain, twelve buses apart: the gaps that bridges leave on real machines.
        Pci {
            domain: index / 16,
            bus: 0x18 + (index % 16) * 12,
            device: 0,
        }
    }

    /// The short spelling with four digits of domain, in NVML's field `busIdLegacy`.
    pub(crate) fn legacy(self) -> String {
        format!(
            "{:04X}:{:02X}:{:02X}.0",
            self.domain & 0xffff,
            self.bus,
            self.device
        )
    }
}

impl fmt::Display for Pci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:08X}:{:02X}:{:02X}.0",
            self.domain, self.bus, self.device
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_all_spellings_and_nothing_else() {
        let expected = Pci {
            domain: 0,
            bus: 0x3a,
            device: 0,
        };
        for text in ["00000000:3A:00.0", "0000:3a:00.0", "3A:00.0"] {
            assert_eq!(Pci::parse(text), Some(expected), "{text}");
        }
        for text in [
            "",
            "3A",
            "3A:00",
            "3A:00.1",
            "1:2:3:4.0",
            "100:00.0",
            "+3:00.0",
            ":00.0",
            "3A:20.0",
        ] {
            assert_eq!(Pci::parse(text), None, "{text}");
        }
        assert_eq!(expected.to_string(), "00000000:3A:00.0");
        assert_eq!(expected.legacy(), "0000:3A:00.0");
    }

    #[test]
    fn indices_have_distinct_valid_addresses() {
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..crate::MAX_GPUS {
            let text = Pci::of_index(index).to_string();
            assert_eq!(Pci::parse(&text), Some(Pci::of_index(index)));
            assert!(seen.insert(text));
        }
    }
}
