//! Tests of steps that were saved with loss and then exactly.

use std::cell::RefCell;
use std::fs;
use std::rc::Rc;

use super::*;
use crate::delta::Method;
use crate::durable::watch::watching;

fn lossy() -> ChainOptions {
    ChainOptions {
        lossy: Some(Method::Int4),
        ..ChainOptions::exact(9)
    }
}

fn save(store: &CheckpointStore, step: u64, options: &ChainOptions) {
    let saved = store
        .save_delta(&at(step), &capture(step), options)
        .unwrap();
    assert_eq!(told(&saved.warnings), Vec::<String>::new());
}

#[test]
fn an_exact_difference_from_a_lossy_one_is_exact() {
    let (_folder, store) = store();
    save(&store, 1, &lossy());
    save(&store, 2, &lossy());
    save(&store, 3, &ChainOptions::exact(9));
    save(&store, 4, &lossy());
    use Stored::{Alone, Beside};
    let expected = [(1, Alone), (2, Beside(1)), (3, Beside(2)), (4, Beside(3))];
    assert_eq!(stored(&store), expected);
    let methods = [1, 2, 3, 4].map(|step| store.lossy(step).unwrap());
    assert_eq!(
        methods,
        [None, Some(Method::Int4), None, Some(Method::Int4)]
    );
    assert_ne!(store.load_model(2).unwrap().tensors(), capture(2).weights);
    check(&store, 3);
    assert!(store.is_saved(3, true) && store.is_saved(2, false) && !store.is_saved(2, true));
    assert!(!store.is_saved(5, false));
    store.squash(3).unwrap();
    check(&store, 3);
    assert_eq!(store.lossy(3).unwrap(), None);
}

#[test]
fn the_last_is_replaced_by_what_it_was_and_no_other_is() {
    let (folder, store) = store();
    for step in 1..=3 {
        save(&store, step, &lossy());
    }
    let exact = ChainOptions::exact(9);
    let refused = |step: u64, options: &ChainOptions| {
        let error = store
            .save_delta(&at(step), &capture(step), options)
            .unwrap_err();
        assert!(
            matches!(error, CheckpointError::StepExists { .. }),
            "{error}"
        );
    };
    refused(2, &exact);
    refused(3, &lossy());
    let later = store.load(3).unwrap().model;
    let progress = Progress {
        val_loss: Some(0.5),
        ..at(3)
    };
    store.save_delta(&progress, &capture(3), &exact).unwrap();
    refused(3, &exact);
    assert_ne!(store.load(3).unwrap().model, later);
    assert_eq!(store.load_model(3).unwrap().tensors(), capture(3).weights);
    assert_eq!(store.load(3).unwrap().progress, progress);
    assert_eq!(store.lossy(3).unwrap(), None);
    assert_eq!(stored(&store)[2], (3, Stored::Beside(2)));
    assert_eq!(names_in(&step_folder(folder.path(), 3)), [DELTA, STATE]);
    let text = fs::read_to_string(step_folder(folder.path(), 3).join(STATE)).unwrap();
    assert!(!text.contains("replaces"), "{text}");
    // The chain continues from the replaced step.
    save(&store, 4, &exact);
    check(&store, 4);
    assert_eq!(stored(&store)[3], (4, Stored::Beside(3)));
}

#[test]
fn d7_a_kill_at_any_change_leaves_the_one_or_the_other() {
    let (folder, store) = store();
    for step in 1..=3 {
        save(&store, step, &lossy());
    }
    let near = store.load_model(3).unwrap().tensors();
    let copies = tempfile::tempdir().unwrap();
    let made = Rc::new(RefCell::new(Vec::new()));
    let (run, to, list) = (
        folder.path().to_path_buf(),
        copies.path().to_path_buf(),
        made.clone(),
    );
    watching(
        move |_| {
            let copy = to.join(list.borrow().len().to_string());
            copy_folder(&run, &copy);
            list.borrow_mut().push(copy);
        },
        || save(&store, 3, &ChainOptions::exact(9)),
    );
    let made = made.take();
    let (mut old, mut new) = (0, 0);
    for copy in &made {
        let killed = CheckpointStore::new(copy);
        assert_eq!(killed.steps().unwrap(), [1, 2, 3]);
        killed.verify(3).unwrap();
        let weights = killed.load_model(3).unwrap().tensors();
        if killed.is_saved(3, true) {
            new += 1;
            assert_eq!(weights, capture(3).weights);
        } else {
            old += 1;
            assert_eq!(weights, near);
            // The next step can read it, and it can be replaced again.
            let again = copies.path().join("again");
            copy_folder(copy, &again);
            let again = CheckpointStore::new(&again);
            save(&again, 3, &ChainOptions::exact(9));
            check(&again, 3);
            fs::remove_dir_all(copies.path().join("again")).unwrap();
        }
        killed.sweep().unwrap();
        save(&killed, 4, &ChainOptions::exact(9));
        check(&killed, 4);
        let names = names_in(&copy.join("checkpoints"));
        assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
    }
    assert!(old > 5 && new > 2, "{old} and {new}");
}
