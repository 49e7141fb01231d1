//! How ranks speak with each other, and what becomes of them when one of them fails.

use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use vqrae::error::{Error, Result};
use vqrae::train::ranks::{Alone, Ranks, each};
use vqrae::{Device, Tensor};

/// Runs `work` on `n` ranks, and what it returns there: the error of [`each`], or `Ok`. A minute is a hang.
fn on_ranks(n: usize, work: impl Fn(&dyn Ranks) -> Result<()> + Send + Sync + 'static) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let work = |ranks: Rc<dyn Ranks>| work(&*ranks);
        let _ = sender.send(each(&vec![Device::Cpu; n], work, work));
    });
    receiver.recv_timeout(Duration::from_secs(60)).expect("the ranks wait for each other")
}

fn error_of(result: Result<()>) -> String {
    result.expect_err("an error").to_string()
}

#[test]
fn sums_and_gathered_values_are_in_the_order_of_the_ranks_and_the_same_on_all() {
    on_ranks(3, |ranks| {
        let rank = ranks.rank();
        for round in 0..200u32 {
            // Large numbers that cancel: the order of the sum shows.
            let own = [[1e8f32, 1.0], [1.0, 2.0], [-1e8, 3.0 + round as f32]][rank];
            let sum = ranks.sum(&Tensor::new(&[own], &Device::Cpu)?)?;
            assert_eq!(sum.to_vec2::<f32>()?, [[(1e8 + 1.0) - 1e8, 6.0 + round as f32]]);
            let mut numbers = [0.25 * rank as f64, f64::from(round)];
            ranks.add(&mut numbers)?;
            assert_eq!(numbers, [0.75, 3.0 * f64::from(round)]);
            assert_eq!(ranks.codes(vec![round; rank])?, [round; 3]);
            assert!(ranks.any(rank == 1)?);
            assert!(!ranks.any(false)?);
        }
        let joined = ranks.join(&Tensor::new(&[[rank as f32, 0.5]], &Device::Cpu)?)?;
        assert_eq!(joined.to_vec2::<f32>()?, [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]);
        let own = if rank == 1 { vec!["a\nb".to_string(), "c".into()] } else { Vec::new() };
        assert_eq!(ranks.lines(own)?, ["a b", "c"]);
        ranks.agree("weights", b"same")
    })
    .expect("ranks");
}

#[test]
fn one_rank_has_nothing_to_wait_for() {
    let alone = Alone(Device::Cpu);
    let tensor = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    assert_eq!(alone.sum(&tensor).unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    assert_eq!(alone.codes(vec![7]).unwrap(), [7]);
    assert!((alone.is_first(), alone.size()) == (true, 1) && alone.any(true).unwrap() && !alone.any(false).unwrap());
    assert!(error_of(each(&[], |_| Ok(()), |_| Ok(()))).contains("no device"));
}

#[test]
fn a_rank_that_fails_ends_the_others_and_its_error_is_told() {
    for failing in 0..3 {
        let error = error_of(on_ranks(3, move |ranks| {
            for step in 0.. {
                if (step, ranks.rank()) == (5, failing) {
                    return Err(Error::Training("the disk is full".into()));
                }
                ranks.add(&mut [1.0])?;
            }
            Ok(())
        }));
        assert!(error.contains("the disk is full"), "rank {failing}: {error}");
    }
}

#[test]
fn a_rank_that_panics_ends_the_others() {
    let error = error_of(on_ranks(3, |ranks| {
        ranks.any(false)?;
        assert!(ranks.rank() != 2, "on purpose");
        ranks.any(false).map(drop)
    }));
    assert!(error.contains("rank 2"), "{error}");
}

#[test]
fn a_rank_that_is_done_early_leaves_none_waiting() {
    let error = error_of(on_ranks(2, |ranks| if ranks.rank() == 1 { Ok(()) } else { ranks.any(true).map(drop) }));
    assert!(error.contains("rank 1 of 2 has ended"), "{error}");
}

#[test]
fn ranks_that_do_different_things_are_told_so() {
    let error = error_of(on_ranks(2, |ranks| {
        let tensor = Tensor::zeros(3 + ranks.rank(), vqrae::DType::F32, &Device::Cpu)?;
        ranks.sum(&tensor).map(drop)
    }));
    assert!(error.contains("something else than the others"), "{error}");
    let error = error_of(on_ranks(2, |ranks| {
        if ranks.rank() == 0 {
            ranks.any(true).map(drop)
        } else {
            ranks.sum(&Tensor::new(1f32, &Device::Cpu)?).map(drop)
        }
    }));
    assert!(error.contains("something else than the others"), "{error}");
}

#[test]
fn ranks_that_hold_other_weights_are_found() {
    let error = error_of(on_ranks(3, |ranks| ranks.agree("weights", if ranks.rank() == 2 { b"b" } else { b"a" })));
    assert!(error.contains("the weights of rank 2 are no longer those of rank 0"), "{error}");
}
