//! The environment variable that chooses instructions reaches the search.

use vqrae_kernels::cpu::{Isa, VARIABLE};
use vqrae_kernels::nearest::Precision;
use vqrae_kernels::{Codebook, Error, Metric};

fn codebook(d: usize) -> Result<Codebook, Error> {
    Codebook::new(vec![1.0; 2 * d], d, Metric::Cosine)
}

fn set(name: &str) {
    // SAFETY: the only test of this process is the only one to read or write its variables.
    unsafe { std::env::set_var(VARIABLE, name) };
}

#[test]
fn the_variable_chooses_the_instructions_or_is_refused() {
    for &isa in Isa::available() {
        set(isa.name());
        for d in [1, 64, 1536] {
            let screening = codebook(d).unwrap().screening();
            assert_eq!(screening, Some((isa, Precision::for_width(d, isa))));
        }
    }
    set("abacus");
    let error = codebook(4).unwrap_err();
    assert!(matches!(&error, Error::NoSuchInstructions { name, .. } if name == "abacus"), "{error}");
}
