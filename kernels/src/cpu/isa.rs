//! Which instructions the processor at hand has for matrix products, and which of them to use.

use std::sync::OnceLock;

use crate::Error;

/// The environment variable that names the instructions to use instead of the best ones: a value of [`Isa::name`].
pub const VARIABLE: &str = "VQRAE_CPU";

/// A set of instructions for matrix products, the best last. A value proves that this machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(pub(super) Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Set {
    Portable,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    AmxBf16,
}

impl Isa {
    /// What any processor can do, through the `gemm` crate.
    pub const PORTABLE: Self = Self(Set::Portable);

    /// The set that `VQRAE_CPU` names, or else the best of this machine.
    ///
    /// # Errors
    /// If the variable names a set that this machine has not; the error lists those that it has.
    pub fn detect() -> Result<Self, Error> {
        match std::env::var(VARIABLE) {
            Ok(name) if !name.is_empty() => Self::named(&name),
            _ => Ok(Self::best()),
        }
    }

    /// The set of this name.
    ///
    /// # Errors
    /// If this machine has no set of this name.
    pub fn named(name: &str) -> Result<Self, Error> {
        let available = Self::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| Error::NoSuchInstructions {
            name: name.to_string(),
            available: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    fn best() -> Self {
        Self::available().last().copied().unwrap_or(Self::PORTABLE)
    }

    /// Every set that this machine has, the best last.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(unused_mut))]
            let mut sets = vec![Set::Portable];
            #[cfg(target_arch = "aarch64")]
            sets.push(Set::Neon); // part of the architecture
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    sets.push(Set::Avx2);
                }
                if is_x86_feature_detected!("avx512f") {
                    sets.push(Set::Avx512);
                    if is_x86_feature_detected!("avx512bf16") {
                        sets.push(Set::Avx512Bf16);
                        if super::product::amx::is_usable() {
                            sets.push(Set::AmxBf16);
                        }
                    }
                }
            }
            sets.into_iter().map(Self).collect()
        })
    }

    /// The sets that tests force: that of `VQRAE_CPU` alone if it is given, else all of this machine.
    #[cfg(test)]
    pub(crate) fn tested() -> Vec<Self> {
        match std::env::var(VARIABLE) {
            Ok(name) if !name.is_empty() => vec![Self::named(&name).unwrap()],
            _ => Self::available().to_vec(),
        }
    }

    /// Its name, as `VQRAE_CPU` takes it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "aarch64")]
            Set::Neon => "neon",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Set::AmxBf16 => "amx-bf16",
        }
    }

    /// Whether it multiplies bf16 numbers faster than f32 ones.
    pub fn has_bf16(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 | Set::AmxBf16 => true,
            _ => false,
        }
    }

    /// Which sets give the same bits: those of one name do, for products of `bf16` or else f32 numbers.
    ///
    /// AVX2, AVX-512 and NEON all add one fused product after the other, so they share a name. The bf16 instructions of
    /// AVX-512 and of AMX round in ways of their own.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "only x86-64 has bf16 instructions here")
    )]
    pub fn arithmetic(self, bf16: bool) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 | Set::AmxBf16 if bf16 => self.name(),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => "fma",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_of_this_machine_is_found_by_its_name() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()), Ok(*isa));
        }
    }

    #[test]
    fn a_set_that_is_not_here_is_refused_with_those_that_are() {
        let error = Isa::named("mmx").unwrap_err().to_string();
        assert!(error.contains("mmx") && error.contains("portable"), "{error}");
    }
}
